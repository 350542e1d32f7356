"""Feature extraction: stored features are the backbone's own, shards resume, misfits are refused."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.models import save_for_hf
from transformers import PvtV2Config, PvtV2Model, ViTImageProcessor

from routevl.backbones import pretrain_vision
from routevl.backbones.vision import VisionBackbone, load_vision_backbone
from routevl.errors import RoutevlError
from routevl.features import extract, index
from routevl.features.images import ImageFile, read_image, read_image_lists, slice_of_shard
from routevl.features.index import TOKENS
from routevl.features.store import Features
from routevl.files import sha256_of, write_json
from routevl.live_vision import LiveVision


def run(stage: ModuleType, *options: object) -> None:
    """Run a stage with command-line options."""
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    stage.run(parser.parse_args([str(option) for option in options]))


def make_backbone(folder: Path, seed: int) -> Path:
    """A toy ViT in timm's format."""
    run(pretrain_vision, "--output", folder, "--seed", seed, "--images", 8, "--epochs", 1, "--hidden-size", 16,
        "--layers", 1, "--heads", 2, "--image-size", 32, "--patch-size", 16)  # fmt: skip
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
    for number in range(11):
        mode = ("RGB", "L", "RGBA", "CMYK")[number % 4]
        suffix = ("png", "jpg", "png", "jpg")[number % 4]
        pixels = generator.integers(0, 256, (20 + 7 * number, 50, 3), dtype=numpy.uint8)
        file = tmp_path / f"image{number}.{suffix}"
        Image.fromarray(pixels).convert(mode).save(file)
        entries.append({"id": 100 - 3 * number, "file_name": str(file)})
    write_json(tmp_path / "train.json", entries[:7])
    write_json(tmp_path / "test.json", entries[5:])
    return tmp_path


def make_shard(folder: Path, backbone_folder: Path, output: Path, *options: object) -> Path:
    lists = ("--images", folder / "train.json", folder / "test.json")
    run(extract, *lists, "--backbone", backbone_folder, "--batch-size", 3, "--output", output, *options)
    return output


def make_features(folder: Path, backbone_folder: Path, shards: int = 2) -> Path:
    """All shards and their index; returns the features' folder."""
    output = folder / "features"
    files = [
        make_shard(folder, backbone_folder, output / f"shard-{number}.safetensors", "--shard", number, "--shards", shards)
        for number in range(shards)
    ]
    run(index, "--shards", *reversed(files), "--output", output / "index.json")
    return output


def test_stored_features_are_the_backbones_own(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    folder = make_features(images, backbone_folder)
    stored = {tokens: Features(folder, tokens) for tokens in TOKENS}
    assert [(stored[tokens].length, stored[tokens].width) for tokens in TOKENS] == [(1, 16), (4, 16), (4, 16), (5, 16)]
    listed = read_image_lists([images / "train.json", images / "test.json"])
    assert len(listed) == len(stored["pooled"]) == 11
    for image in listed:
        with torch.inference_mode():
            alone = backbone.encode(backbone.transform(read_image(image))[None], TOKENS)
        for tokens, expected in alone.items():
            found = stored[tokens].features([image.image_id])
            torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=1e-6)


def test_stored_features_are_bit_equal_to_the_same_batches(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    shard = make_shard(images, backbone_folder, images / "shard.safetensors")
    listed = read_image_lists([images / "train.json", images / "test.json"])
    with safe_open(shard, framework="pt") as file, torch.inference_mode():
        for start in range(0, 11, 3):
            batch = torch.stack([backbone.transform(read_image(image)) for image in listed[start : start + 3]])
            for tokens, expected in backbone.encode(batch, TOKENS).items():
                assert torch.equal(file.get_tensor(tokens)[start : start + 3], expected)
        assert file.get_tensor("image_ids").tolist() == sorted(image.image_id for image in listed)


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A MobileNetV3, whose head reads wider features than the map before it has."""
    size = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    model = timm.create_model("mobilenetv3_small_050", pretrained_cfg_overlay=size)
    save_for_hf(model, str(tmp_path / "mobilenet"), safe_serialization=True)
    return tmp_path / "mobilenet"


def test_each_kind_of_tokens_has_its_own_width(images: Path, narrow: Path) -> None:
    folder = make_features(images, narrow)
    stored = {tokens: Features(folder, tokens) for tokens in TOKENS}
    assert {name: (of.length, of.width) for name, of in stored.items()} == {
        "pooled": (1, 1024), "patches": (4, 288), "grid": (4, 288), "all": (5, 288),
    }  # fmt: skip
    model = timm.create_model(f"local-dir:{narrow}", pretrained=True, num_classes=0).eval()
    transform = load_vision_backbone(narrow).transform
    for image in read_image_lists([images / "train.json"]):
        with torch.inference_mode():
            pixels = transform(read_image(image))[None]
            pooled, hidden_states = model(pixels), model.forward_features(pixels)
        corners = torch.stack([hidden_states[0, :, row, column] for row in (0, 1) for column in (0, 1)])
        torch.testing.assert_close(stored["pooled"].features([image.image_id]), pooled[None])
        torch.testing.assert_close(stored["patches"].features([image.image_id]), corners[None])


def test_tokens_of_another_shape_than_was_found_are_refused(narrow: Path) -> None:
    with pytest.raises(RoutevlError, match=r"mobilenet: patches tokens of the shape \(16, 288\), not \(4, 288\)$"):
        load_vision_backbone(narrow).encode(torch.zeros(1, 3, 128, 128), TOKENS)


def test_tokens_that_the_model_does_not_give_are_refused_before_an_image_is_read(images: Path, tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    PvtV2Model(PvtV2Config(**sizes)).save_pretrained(tmp_path / "pvt")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "pvt")
    for file in images.glob("image*.*"):
        file.rename(file.with_suffix(".away"))
    refused = (
        rf"^backbone {tmp_path}/pvt: no pooled tokens: [^\n]*; leave pooled out of features.tokens and visual_tokens, or [^\n]*$"
    )
    with pytest.raises(RoutevlError, match=refused):
        make_shard(images, tmp_path / "pvt", images / "shard.safetensors")
    method = SimpleNamespace(adapt_vision=lambda model: model)
    with pytest.raises(RoutevlError, match=refused):
        LiveVision(tmp_path / "pvt", method, images, "pooled")
    live = LiveVision(tmp_path / "pvt", method, prepared_split(images), "patches")
    assert (live.length, live.width) == (4, 8)
    assert live.encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 8)
    for file in images.glob("image*.away"):
        file.rename(file.with_suffix(".jpg" if int(file.stem[5:]) % 2 else ".png"))
    shard = make_shard(images, tmp_path / "pvt", images / "shard.safetensors", "--tokens", "patches")
    run(index, "--shards", shard, "--output", images / "index.json")
    assert Features(images, "patches").features([100]).shape == (1, 4, 8)


def prepared_split(images: Path) -> Path:
    """The folder with its first list of images as `prepare` leaves it."""
    (images / "train").mkdir()
    shutil.copy(images / "train.json", images / "train" / "images.json")
    return images


def test_reading_by_id_keeps_order_and_repetitions(images: Path, backbone_folder: Path) -> None:
    stored = Features(make_features(images, backbone_folder), "patches")
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
    monkeypatch.setattr(extract, "IMAGES_PER_CHUNK", 4)
    whole = make_shard(images, backbone_folder, images / "whole.safetensors").read_bytes()
    resumed = images / "resumed.safetensors"
    encode_batch, calls = extract._encode_batch, []

    def fail_late(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode_batch(*arguments)

    monkeypatch.setattr(extract, "_encode_batch", fail_late)
    with pytest.raises(KeyboardInterrupt):
        make_shard(images, backbone_folder, resumed)
    partial = Path(f"{resumed}.partial")
    assert not resumed.exists() and len(list(partial.iterdir())) == 1
    monkeypatch.setattr(extract, "_encode_batch", encode_batch)
    make_shard(images, backbone_folder, resumed)
    said = capsys.readouterr().out
    assert "1 of 3 chunks are there already" in said
    assert [match[1] for match in extract.TIMING.finditer(said)] == ["11", "7"]  # images that were encoded
    assert resumed.read_bytes() == whole and not partial.exists()


def test_memory_that_a_layer_gives_back_is_there_for_the_next_one() -> None:
    """The kernel would have to clear each page of it again. In a new process: another test may have extracted in this one. Ten
    layers, as the first ones may leave a gap that is a few bytes too short for the next."""
    program = """
import resource, torch
from routevl.features import extract

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
before = new_pages()
extract._keep_freed_memory()
print(before, new_pages())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, kept = map(int, ended.stdout.split())
    assert kept < before / 2


def test_full_disk_is_one_clear_error(images: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(extract, "save_file", save_file)
    with pytest.raises(RoutevlError, match="could not write .*chunk-000000000.safetensors: No space left"):
        make_shard(images, backbone_folder, images / "shard.safetensors")
    assert not (images / "shard.safetensors").exists()


def test_chunks_of_other_images_or_backbones_are_not_reused(
    images: Path, backbone_folder: Path, backbone: VisionBackbone
) -> None:
    listed = read_image_lists([images / "train.json"])
    metadata = {"backbone_fingerprint": backbone.fingerprint}
    (chunk,) = extract._plan_chunks(listed, images / "partial", metadata)
    arguments = argparse.Namespace(batch_size=4, workers=0, precision="float32")
    extract._fill_chunks([chunk], backbone, ["pooled"], arguments)
    assert chunk.is_done()
    (other,) = extract._plan_chunks(listed, images / "partial", {"backbone_fingerprint": "another"})
    assert other.path == chunk.path and not other.is_done()
    Image.new("RGB", (9, 9)).save(listed[0].file_name)
    assert not extract._plan_chunks(listed, images / "partial", metadata)[0].is_done()
    chunk.path.write_bytes(chunk.path.read_bytes()[:-1])
    assert not chunk.is_done()


def test_worker_processes_give_the_same_bytes(images: Path, backbone_folder: Path) -> None:
    alone = make_shard(images, backbone_folder, images / "alone.safetensors")
    helped = make_shard(images, backbone_folder, images / "helped.safetensors", "--workers", 2)
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
        make_shard(images, backbone_folder, images / "shard.safetensors", "--workers", workers)
    assert "\n" not in str(caught.value)
    assert not (images / "shard.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_h21_all_damaged_images_of_a_shard_are_named_in_one_run(
    images: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """In whatever batch or chunk they are; sound chunks are kept, so that the next run computes the others alone."""
    monkeypatch.setattr(extract, "IMAGES_PER_CHUNK", 4)
    whole = {number: (images / f"image{number}.jpg").read_bytes() for number in (1, 3, 5)}
    (images / "image1.jpg").write_bytes(b"")
    (images / "image3.jpg").unlink()
    (images / "image5.jpg").write_bytes(whole[5][:600])
    shard = images / "shard.safetensors"
    with pytest.raises(RoutevlError, match="^3 images cannot be used: ") as caught:
        make_shard(images, backbone_folder, shard, "--workers", workers)
    for number in (1, 3, 5):
        assert str(caught.value).count(f"image {100 - 3 * number}: ") == str(caught.value).count(f"image{number}.jpg") == 1
    assert not shard.exists()
    for number, content in whole.items():
        (images / f"image{number}.jpg").write_bytes(content)
    make_shard(images, backbone_folder, shard)
    assert "1 of 3 chunks are there already" in capsys.readouterr().out


def prepared(images: Path) -> dict[int, Path]:
    """Adds the hashes to both lists, as `prepare` writes them; returns the files by id."""
    files = {}
    for path in (images / "train.json", images / "test.json"):
        entries = json.loads(path.read_text())
        files |= {entry["id"]: Path(entry["file_name"]) for entry in entries}
        write_json(path, [entry | {"sha256": sha256_of(entry["file_name"])} for entry in entries])
    return files


@pytest.mark.parametrize("workers", [0, 1])
def test_b11_an_image_swapped_after_prepare_is_refused(images: Path, backbone_folder: Path, workers: int) -> None:
    by_hand = make_shard(images, backbone_folder, images / "by_hand.safetensors").read_bytes()
    file, shard = prepared(images)[97], images / "shard.safetensors"
    assert make_shard(images, backbone_folder, shard).read_bytes() == by_hand
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    shard.unlink()
    Image.new("CMYK", (9, 9)).save(file)
    os.utime(file, ns=times)
    with pytest.raises(RoutevlError, match=r"^image 97: .*image1\.jpg is not the image that was prepared$"):
        make_shard(images, backbone_folder, shard, "--workers", workers)
    assert not shard.exists()
    file.write_bytes(content)
    assert make_shard(images, backbone_folder, shard).read_bytes() == by_hand


def test_b11_chunks_are_of_the_images_that_were_prepared(images: Path) -> None:
    """A file that changes its time is the same image; one that keeps size and time may be another."""
    files = prepared(images)

    def sources() -> str:
        (chunk,) = extract._plan_chunks(read_image_lists([images / "train.json"]), images / "partial", {})
        return chunk.metadata["sources"]

    before = sources()
    os.utime(files[97], ns=(1, 1))
    assert sources() == before
    content = files[97].read_bytes()
    files[97].write_bytes(content[:-1] + b"!")
    os.utime(files[97], ns=(1, 1))
    prepared(images)
    assert sources() != before


def test_b11_a_run_from_pixels_refuses_a_swapped_image(images: Path, backbone_folder: Path) -> None:
    files = prepared(images)
    prepared_split(images)
    method = SimpleNamespace(adapt_vision=lambda model: model)
    live = LiveVision(backbone_folder, method, images, "pooled")
    assert live.of([100, 97]).shape == (2, 3, 32, 32)
    for image_id in (97, 91):
        files[image_id].write_bytes(b"no image")
    with pytest.raises(RoutevlError, match="^2 images cannot be used: image 97: .* is not the image that was .*; image 91: "):
        live.of([100, 97, 91])


def test_lower_precision_is_close_and_recorded(images: Path, backbone_folder: Path) -> None:
    full = make_shard(images, backbone_folder, images / "full.safetensors")
    half = make_shard(images, backbone_folder, images / "half.safetensors", "--precision", "bfloat16")
    with safe_open(full, framework="pt") as first, safe_open(half, framework="pt") as second:
        expected, found = first.get_tensor("pooled"), second.get_tensor("pooled")
        assert second.metadata()["precision"] == "bfloat16" and found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_shards_that_do_not_belong_together(images: Path, backbone_folder: Path, tmp_path: Path) -> None:
    first = make_shard(images, backbone_folder, images / "first", "--shards", 2)
    second = make_shard(images, backbone_folder, images / "second", "--shard", 1, "--shards", 2)
    third = make_shard(images, backbone_folder, images / "third", "--shard", 1, "--shards", 3)
    pooled = make_shard(images, backbone_folder, images / "pooled", "--shard", 1, "--shards", 2, "--tokens", "pooled")
    other_backbone = make_backbone(tmp_path / "other", seed=2)
    other = make_shard(images, other_backbone, images / "other_shard", "--shard", 1, "--shards", 2)
    write_json(images / "train.json", json.loads((images / "train.json").read_text())[:3])
    fewer = make_shard(images, backbone_folder, images / "fewer", "--shard", 1, "--shards", 2)
    for shards, message in [
        ([first], r"found the shards \[0\], expected each of 2 once"),
        ([first, second, second], r"found the shards \[0, 1, 1\], expected each of 2 once"),
        ([first, third], "number of shards 3, but 2"),
        ([first, pooled], "tokens {'pooled': {'length': 1, 'width': 16}}, but "),
        ([first, other], "backbone_fingerprint"),
        ([first, fewer], "image_list"),
        ([first, backbone_folder / "model.safetensors"], "not a feature shard"),
        ([first, images / "train.json"], "not a readable safetensors file"),
    ]:
        with pytest.raises(RoutevlError, match=message):
            run(index, "--shards", *shards, "--output", images / "index.json")
    assert not (images / "index.json").exists()


def test_index_and_reader_refuse_what_does_not_fit(images: Path, backbone_folder: Path, backbone: VisionBackbone) -> None:
    folder = make_features(images, backbone_folder)
    index = json.loads((folder / "index.json").read_text())
    assert index["n"] == 11
    assert index["tokens"] == {
        "pooled": {"length": 1, "width": 16}, "patches": {"length": 4, "width": 16}, "grid": {"length": 4, "width": 16},
        "all": {"length": 5, "width": 16},
    }  # fmt: skip
    assert [shard["file"] for shard in index["shards"]] == ["shard-0.safetensors", "shard-1.safetensors"]
    assert Features(folder, expected_fingerprint=backbone.fingerprint).fingerprint == backbone.fingerprint
    with pytest.raises(RoutevlError, match=f"{backbone.fingerprint}.*another"):
        Features(folder, expected_fingerprint="another")
    assert Features(folder).image_ids.tolist() == sorted(range(70, 101, 3)) and Features(folder).image_ids.dtype == torch.int64
    shard = folder / "shard-1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(backbone.fingerprint.encode(), b"0" * 64))
    with pytest.raises(RoutevlError, match="shard-1.safetensors: of another backbone than its index says"):
        Features(folder)
    shard.write_bytes(whole[:-8])
    with pytest.raises(RoutevlError, match="shard-1.safetensors: not a readable safetensors file"):
        Features(folder)
    write_json(folder / "index.json", {**index, "tokens": {"pooled": 1, "patches": 4}, "width": 16})
    with pytest.raises(RoutevlError, match=r"index.json: an index of an older routevl; index the features again \(routevl "):
        Features(folder)
    write_json(folder / "index.json", {**index, "tokens": {"pooled": {"length": 1, "width": 16}}})
    with pytest.raises(RoutevlError, match="no 'patches' tokens stored"):
        Features(folder, "patches")


def test_b11_a_shard_that_is_not_what_its_index_says(images: Path, backbone_folder: Path) -> None:
    folder = make_features(images, backbone_folder)
    ids = Features(folder).image_ids
    first, second = (folder / f"shard-{number}.safetensors" for number in range(2))
    whole = {path: path.read_bytes() for path in (first, second)}

    def refused(message: str) -> None:
        with pytest.raises(RoutevlError, match=rf"shard-\d.safetensors: {message}.*; index the features again"):
            Features(folder)
        for path, content in whole.items():
            path.write_bytes(content)

    make_shard(images, backbone_folder, first, "--shards", 2, "--precision", "bfloat16")
    refused("of another precision than its index says")
    make_shard(images, backbone_folder, first, "--shards", 3)
    refused("of another shape than its index says")
    described = json.loads((folder / "index.json").read_text())
    for shape in ({"length": 1, "width": 8}, {"length": 2, "width": 8}):  # as many numbers as there are, or not
        write_json(folder / "index.json", {**described, "tokens": {**described["tokens"], "pooled": shape}})
        refused("of another shape than its index says")
    write_json(folder / "index.json", described)
    second.write_bytes(whole[first])
    refused("of another shape than its index says")
    for name, size in (("train", 7), ("test", 6)):  # other ids, as many and in the same order
        entries = json.loads((images / f"{name}.json").read_text())
        write_json(images / f"{name}.json", [entry | {"id": entry["id"] + 1000} for entry in entries])
        assert len(entries) == size
    make_shard(images, backbone_folder, first, "--shards", 2)
    refused("of another list of images than the other shards")
    assert torch.equal(Features(folder).image_ids, ids)


def test_b11_shards_in_each_others_place(images: Path, backbone_folder: Path) -> None:
    entries = json.loads((images / "train.json").read_text())[:6]
    for name in ("train", "test"):
        write_json(images / f"{name}.json", entries)
    folder = make_features(images, backbone_folder)
    first, second = (folder / f"shard-{number}.safetensors" for number in range(2))
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    with pytest.raises(RoutevlError, match="of another list of images than the other shards, or in another place among them"):
        Features(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images": []}, "not a list of images as routevl prepare writes it"),
        ([{"id": 1}], "not a list of images as routevl prepare writes it"),
        ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "image id 1 names b.png"),
    ],
)
def test_malformed_image_lists(tmp_path: Path, entries: object, message: str) -> None:
    write_json(tmp_path / "images.json", entries)
    with pytest.raises(RoutevlError, match=message):
        read_image_lists([tmp_path / "images.json"])


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", 0), ("--threads", 0), ("--workers", -1), ("--shards", 0), ("--shard", "first")]
)
def test_options_out_of_range(images: Path, capsys: pytest.CaptureFixture[str], option: str, value: object) -> None:
    with pytest.raises(SystemExit):
        make_shard(images, images / "vit", images / "shard.safetensors", option, value)
    assert f"argument {option}: {value} is no integer of" in capsys.readouterr().err


def test_shards_cover_all_images_once() -> None:
    listed = [ImageFile(image_id, "") for image_id in range(10)]
    for shards in (1, 3, 10):
        slices = [slice_of_shard(listed, shard, shards) for shard in range(shards)]
        assert sum(slices, []) == listed and max(map(len, slices)) - min(map(len, slices)) <= 1
    with pytest.raises(RoutevlError, match="--shard 3 of --shards 3"):
        slice_of_shard(listed, 3, 3)
