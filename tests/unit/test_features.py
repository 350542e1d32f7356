"""Feature extraction: stored features are the backbone's own, shards resume, misfits are refused."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from routevl import features
from routevl.backbones import VisionBackbone, load_vision_backbone
from routevl.errors import RoutevlError
from routevl.files import write_json
from routevl.pretraining import add_arguments_pretrain_vision, run_pretrain_vision


def run(stage: str, *options: object) -> None:
    """Run a stage of the features module with command-line options."""
    parser = argparse.ArgumentParser()
    getattr(features, f"add_arguments_{stage}")(parser)
    getattr(features, f"run_{stage}")(parser.parse_args([str(option) for option in options]))


def make_backbone(folder: Path, seed: int) -> Path:
    """A toy ViT in timm's format."""
    parser = argparse.ArgumentParser()
    add_arguments_pretrain_vision(parser)
    run_pretrain_vision(parser.parse_args([
        "--output", str(folder), "--seed", str(seed), "--images", "8", "--epochs", "1", "--hidden-size", "16",
        "--layers", "1", "--heads", "2", "--image-size", "32", "--patch-size", "16"]))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbones") / "vit", seed=1)


@pytest.fixture(scope="module")
def backbone(backbone_folder: Path) -> VisionBackbone:
    return load_vision_backbone(backbone_folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven noise images of several sizes, modes and formats, in two overlapping lists."""
    generator = numpy.random.default_rng(0)
    entries = []
    for index in range(11):
        mode = ("RGB", "L", "RGBA", "CMYK")[index % 4]
        suffix = ("png", "jpg", "png", "jpg")[index % 4]
        pixels = generator.integers(0, 256, (20 + 7 * index, 50, 3), dtype=numpy.uint8)
        file = tmp_path / f"image{index}.{suffix}"
        Image.fromarray(pixels).convert(mode).save(file)
        entries.append({"id": 100 - 3 * index, "file_name": str(file)})
    write_json(tmp_path / "train.json", entries[:7])
    write_json(tmp_path / "test.json", entries[5:])
    return tmp_path


def extract(folder: Path, backbone_folder: Path, output: Path, *options: object) -> Path:
    run(
        "extract",
        "--images",
        folder / "train.json",
        folder / "test.json",
        "--backbone",
        backbone_folder,
        "--batch-size",
        3,
        "--output",
        output,
        *options,
    )
    return output


def extract_all(folder: Path, backbone_folder: Path, shards: int = 2) -> Path:
    """All shards and their index; returns the features' folder."""
    output = folder / "features"
    files = [
        extract(
            folder,
            backbone_folder,
            output / f"shard-{number}.safetensors",
            "--shard",
            number,
            "--shards",
            shards,
        )
        for number in range(shards)
    ]
    run("index_features", "--shards", *reversed(files), "--output", output / "index.json")
    return output


def test_stored_features_are_the_backbones_own(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    folder = extract_all(images, backbone_folder)
    stored = {tokens: features.Features(folder, tokens) for tokens in features.TOKENS}
    assert (stored["pooled"].length, stored["patches"].length, stored["pooled"].width) == (1, 4, 16)
    listed = features.read_image_lists([images / "train.json", images / "test.json"])
    assert len(listed) == len(stored["pooled"]) == 11
    for image in listed:
        with torch.inference_mode():
            alone = backbone.encode(backbone.transform(features.read_image(image))[None])
        for tokens, expected in zip(features.TOKENS, alone, strict=True):
            found = stored[tokens].features([image.image_id])
            torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=1e-6)


def test_stored_features_are_bit_equal_to_the_same_batches(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    shard = extract(images, backbone_folder, images / "shard.safetensors")
    listed = features.read_image_lists([images / "train.json", images / "test.json"])
    with safe_open(shard, framework="pt") as file, torch.inference_mode():
        for start in range(0, 11, 3):
            batch = torch.stack([backbone.transform(features.read_image(image)) for image in listed[start : start + 3]])
            pooled, patches = backbone.encode(batch)
            assert torch.equal(file.get_tensor("pooled")[start : start + 3], pooled)
            assert torch.equal(file.get_tensor("patches")[start : start + 3], patches)
        assert file.get_tensor("image_ids").tolist() == sorted(image.image_id for image in listed)


def test_reading_by_id_keeps_order_and_repetitions(images: Path, backbone_folder: Path) -> None:
    stored = features.Features(extract_all(images, backbone_folder), "patches")
    one_by_one = torch.cat([stored.features([image_id]) for image_id in (100, 70, 97, 70)])
    together = stored.features([100, 70, 97, 70])
    assert together.shape == (4, 4, 16) and together.dtype == torch.float32
    assert torch.equal(one_by_one, together)
    assert stored.features([]).shape == (0, 4, 16)
    for unknown in (99, 0, 1000):
        with pytest.raises(RoutevlError, match=f"image {unknown}: no features"):
            stored.features([100, unknown])


def test_extraction_resumes_inside_a_shard(
    images: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "IMAGES_PER_CHUNK", 4)
    whole = extract(images, backbone_folder, images / "whole.safetensors").read_bytes()
    resumed = images / "resumed.safetensors"
    encode_batch, calls = features._encode_batch, []

    def fail_late(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode_batch(*arguments)

    monkeypatch.setattr(features, "_encode_batch", fail_late)
    with pytest.raises(KeyboardInterrupt):
        extract(images, backbone_folder, resumed)
    partial = Path(f"{resumed}.partial")
    assert not resumed.exists() and len(list(partial.iterdir())) == 1
    monkeypatch.setattr(features, "_encode_batch", encode_batch)
    extract(images, backbone_folder, resumed)
    assert "1 of 3 chunks are there already" in capsys.readouterr().out
    assert resumed.read_bytes() == whole and not partial.exists()


def test_full_disk_is_one_clear_error(images: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(RoutevlError, match="could not write .*chunk-000000000.safetensors: No space left"):
        extract(images, backbone_folder, images / "shard.safetensors")
    assert not (images / "shard.safetensors").exists()


def test_chunks_of_other_images_or_backbones_are_not_reused(
    images: Path, backbone_folder: Path, backbone: VisionBackbone
) -> None:
    listed = features.read_image_lists([images / "train.json"])
    metadata = {"backbone_fingerprint": backbone.fingerprint}
    (chunk,) = features._plan_chunks(listed, images / "partial", metadata)
    arguments = argparse.Namespace(batch_size=4, workers=0, precision="float32")
    features._fill_chunks([chunk], backbone, ["pooled"], metadata, arguments)
    assert chunk.is_done(metadata)
    assert not chunk.is_done({"backbone_fingerprint": "another"})
    Image.new("RGB", (9, 9)).save(listed[0].file_name)
    assert not features._plan_chunks(listed, images / "partial", metadata)[0].is_done(metadata)
    chunk.path.write_bytes(chunk.path.read_bytes()[:-1])
    assert not chunk.is_done(metadata)


def test_worker_processes_give_the_same_bytes(images: Path, backbone_folder: Path) -> None:
    alone = extract(images, backbone_folder, images / "alone.safetensors")
    helped = extract(images, backbone_folder, images / "helped.safetensors", "--workers", 2)
    assert alone.read_bytes() == helped.read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "absent"])
def test_damaged_image_is_one_clear_error(images: Path, backbone_folder: Path, damage: str, workers: int) -> None:
    photo = images / "image1.jpg"
    if damage == "absent":
        photo.unlink()
    else:
        photo.write_bytes(photo.read_bytes()[:600] if damage == "truncated" else b"not an image")
    with pytest.raises(RoutevlError, match=r"^image 97: .*image1\.jpg") as caught:
        extract(images, backbone_folder, images / "shard.safetensors", "--workers", workers)
    assert "\n" not in str(caught.value)
    assert not (images / "shard.safetensors").exists()


def test_lower_precision_is_close_and_recorded(images: Path, backbone_folder: Path) -> None:
    full = extract(images, backbone_folder, images / "full.safetensors")
    half = extract(images, backbone_folder, images / "half.safetensors", "--precision", "bfloat16")
    with safe_open(full, framework="pt") as first, safe_open(half, framework="pt") as second:
        expected, found = first.get_tensor("pooled"), second.get_tensor("pooled")
        assert second.metadata()["precision"] == "bfloat16" and found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_shards_that_do_not_belong_together(images: Path, backbone_folder: Path, tmp_path: Path) -> None:
    first = extract(images, backbone_folder, images / "first", "--shards", 2)
    second = extract(images, backbone_folder, images / "second", "--shard", 1, "--shards", 2)
    third = extract(images, backbone_folder, images / "third", "--shard", 1, "--shards", 3)
    pooled = extract(images, backbone_folder, images / "pooled", "--shard", 1, "--shards", 2, "--tokens", "pooled")
    other_backbone = make_backbone(tmp_path / "other", seed=2)
    other = extract(images, other_backbone, images / "other_shard", "--shard", 1, "--shards", 2)
    write_json(images / "train.json", json.loads((images / "train.json").read_text())[:3])
    fewer = extract(images, backbone_folder, images / "fewer", "--shard", 1, "--shards", 2)
    for shards, message in [
        ([first], "shard 1 of 2 is missing"),
        ([first, second, second], "shard 1 of 2 is given 2 times"),
        ([first, third], "number of shards 3, but 2"),
        ([first, pooled], "lengths"),
        ([first, other], "backbone_fingerprint"),
        ([first, fewer], "image_list"),
        ([first, backbone_folder / "model.safetensors"], "not a feature shard"),
        ([first, images / "train.json"], "not a readable safetensors file"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            run("index_features", "--shards", *shards, "--output", images / "index.json")
    assert not (images / "index.json").exists()


def test_index_and_reader_refuse_what_does_not_fit(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    folder = extract_all(images, backbone_folder)
    index = json.loads((folder / "index.json").read_text())
    assert index["n"] == 11 and index["tokens"] == {"pooled": 1, "patches": 4} and index["width"] == 16
    assert [shard["file"] for shard in index["shards"]] == ["shard-0.safetensors", "shard-1.safetensors"]
    assert features.Features(folder, expected_fingerprint=backbone.fingerprint).fingerprint == backbone.fingerprint
    with pytest.raises(RoutevlError, match=f"{backbone.fingerprint}.*another"):
        features.Features(folder, expected_fingerprint="another")
    shard = folder / "shard-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(RoutevlError, match="shard-1.safetensors: not a readable safetensors file"):
        features.Features(folder)
    write_json(folder / "index.json", {**index, "tokens": {"pooled": 1}})
    with pytest.raises(RoutevlError, match="no 'patches' tokens stored"):
        features.Features(folder, "patches")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images": []}, "expected a list"),
        ([{"id": "1", "file_name": "a.png"}], "entry 0"),
        ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "image id 1 names b.png"),
    ],
)
def test_malformed_image_lists(tmp_path: Path, entries: object, message: str) -> None:
    write_json(tmp_path / "images.json", entries)
    with pytest.raises(RoutevlError, match=message):
        features.read_image_lists([tmp_path / "images.json"])


def test_shards_cover_all_images_once() -> None:
    listed = [features.ImageFile(image_id, "") for image_id in range(10)]
    for shards in (1, 3, 10):
        slices = [features.slice_of_shard(listed, shard, shards) for shard in range(shards)]
        assert sum(slices, []) == listed and max(map(len, slices)) - min(map(len, slices)) <= 1
    with pytest.raises(RoutevlError, match="--shard 3 of --shards 3"):
        features.slice_of_shard(listed, 3, 3)
