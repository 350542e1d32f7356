"""Loading backbones: formats, preprocessing, images of any kind, and the demo's own pretraining."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from routevl.backbones import derive, fetch, pretrain_text, pretrain_vision
from routevl.backbones.folder import Origin, fingerprint_of, origin_of, public_name
from routevl.backbones.pretrain_text import ARCHITECTURES, without_spans
from routevl.backbones.text import load_text_backbone, text_skeleton
from routevl.backbones.vision import load_vision_backbone, vision_tokens
from routevl.backbones.vision_timm import TimmFolder
from routevl.backbones.vision_transformers import TransformersFolder
from routevl.errors import RoutevlError
from routevl.features.grid import pooled_grid
from routevl.features.index import TOKENS

TINY = "--seed 1 --epochs 1 --hidden-size 16 --layers 1 --heads 2 --batch-size 8".split()


def pretrain(stage: ModuleType, output: Path, *options: str) -> Path:
    """Run one of the pretraining stages at a toy size."""
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    stage.run(parser.parse_args([*TINY, "--output", str(output), *options]))
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy backbone of each kind."""
    root = tmp_path_factory.mktemp("backbones")
    made = {
        name: pretrain(pretrain_text, root / name, "--architecture", name, "--sentences", "40")
        for name in ("roberta", "gpt2", "bart")
    }
    made["timm"] = pretrain(pretrain_vision, root / "timm", "--images", "16")
    made["resnet"] = pretrain(pretrain_vision, root / "resnet", "--architecture", "resnet", "--images", "16")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    size = {"height": 32, "width": 32}
    vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    for name, weights in (("vit", vit.state_dict()), ("vit_without_pooler", _without_pooler(vit))):
        vit.save_pretrained(root / name, state_dict=weights)
        ViTImageProcessor(size=size).save_pretrained(root / name)
        made[name] = root / name
    text = {**sizes, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}))
    clip.save_pretrained(root / "clip")
    ViTImageProcessor(size=size).save_pretrained(root / "clip")
    made["clip"] = root / "clip"
    return made


def _without_pooler(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weights for name, weights in model.state_dict().items() if not name.startswith("pooler.")}


def test_text_folders_load_with_transformers(folders: dict[str, Path]) -> None:
    for name, auto_class in (("roberta", AutoModel), ("gpt2", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)):
        options = {"add_pooling_layer": False} if name == "roberta" else {}
        _, loading = auto_class.from_pretrained(folders[name], output_loading_info=True, **options)
        assert not loading["missing_keys"]
        tokenizer = AutoTokenizer.from_pretrained(folders[name])
        text = "is there a red circle? Ünseen"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for name in ("roberta", "bart"):
        assert AutoTokenizer.from_pretrained(folders[name]).convert_ids_to_tokens([0, 1, 2]) == ["<s>", "<pad>", "</s>"]
    assert AutoTokenizer.from_pretrained(folders["gpt2"]).eos_token == "<|endoftext|>"


def test_text_backbone_is_frozen_float32_without_pooler(folders: dict[str, Path]) -> None:
    model, tokenizer = load_text_backbone(folders["roberta"], "encoder")
    assert model.pooler is None and not model.training
    assert all(not weights.requires_grad and weights.dtype == torch.float32 for weights in model.parameters())
    hidden_states = model(**tokenizer(["how many circles are there?"], return_tensors="pt")).last_hidden_state
    assert hidden_states.shape[-1] == 16
    causal, _ = load_text_backbone(folders["gpt2"], "decoder")
    assert causal.lm_head.out_features == causal.config.vocab_size


def test_an_encoder_decoder_is_also_read_from_weights_without_its_head(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the hub's bart-base are."""
    copy = shutil.copytree(folders["bart"], tmp_path / "bart")
    BartModel.from_pretrained(folders["bart"]).save_pretrained(copy)
    texts = ["is there a red circle?", "both images have a cross."]
    logits = []
    for folder in (folders["bart"], copy):
        model, tokenizer = load_text_backbone(folder, "encoder-decoder")
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits.append(model(**batch, decoder_input_ids=batch["input_ids"]).logits)
    assert torch.equal(*logits)
    skeleton, _ = text_skeleton(folders["bart"], "encoder-decoder")
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {name: p.shape for name, p in model.named_parameters()}
    assert skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("gpt2", "encoder", "a gpt2 model; needs a bidirectional text encoder such as roberta"),
        ("roberta", "decoder", "a roberta model; needs a causal language model such as gpt2"),
        ("bart", "encoder", "a bart model; needs a bidirectional text encoder such as roberta"),
        ("bart", "decoder", "a bart model; needs a causal language model such as gpt2"),
        ("roberta", "encoder-decoder", "a roberta model; needs an encoder-decoder such as bart"),
        ("gpt2", "encoder-decoder", "a gpt2 model; needs an encoder-decoder such as bart"),
        ("vit", "encoder", "bidirectional text encoder"),
        ("timm", "decoder", "not of a transformers model|causal language model"),
    ],
)
def test_wrong_kind_of_text_model(folders: dict[str, Path], name: str, kind: str, message: str) -> None:
    with pytest.raises(RoutevlError, match=message):
        load_text_backbone(folders[name], kind)


def test_text_model_is_not_a_vision_backbone(folders: dict[str, Path]) -> None:
    with pytest.raises(RoutevlError, match="a roberta model, not an image encoder"):
        load_vision_backbone(folders["roberta"])


def test_unusable_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RoutevlError, match=r"nowhere: no such folder \(routevl fetch-backbone"):
        load_vision_backbone(tmp_path / "nowhere")
    with pytest.raises(RoutevlError, match="no config.json"):
        load_vision_backbone(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folders["vit"] / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RoutevlError, match="found pytorch_model.bin; pickled weights are not loaded"):
        load_vision_backbone(pickled)


@pytest.mark.parametrize("name", ["roberta", "vit", "timm"])
def test_truncated_weights(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(folders[name], tmp_path / name)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RoutevlError, match="load"):
        if name == "roberta":
            load_text_backbone(broken, "encoder")
        else:
            load_vision_backbone(broken)


def fetch_model(hub_id: str, folder: Path) -> None:
    fetch.run(argparse.Namespace(hub_id=hub_id, revision="abc", output=folder))


def test_offline_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RoutevlError, match="owner/name at revision abc: .*local cache does not hold it"):
        fetch_model("owner/name", tmp_path / "folder")
    with pytest.raises(RoutevlError, match="no such folder, and not a Hugging Face hub id"):
        fetch_model("/a/folder/that/is/not/there", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("results/backbones/vit", "./results/backbones/vit"),
        ("models/roberta", "./models/roberta"),  # which is no hub id
        ("../elsewhere/roberta", "./roberta"),
        ("/home/somebody/models/roberta-base/", "./roberta-base"),
    ],
)
def test_a_public_name_has_no_folder_outside_and_is_no_hub_id(path: str, name: str) -> None:
    assert public_name(path) == name
    with pytest.raises(HFValidationError):
        validate_repo_id(name)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# A model\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\n---\n", {"license": "other", "license_name": "own"}),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("---\nlicense: : mit\n---\n", {}),
        ("# A model without metadata\n", {}),
        (None, {}),
    ],
)
def test_a_fetched_folder_tells_where_it_comes_from_and_its_licence(tmp_path: Path, card: str | None, license: dict) -> None:
    (tmp_path / "source.json").write_text('{"hub_id": "owner/name", "commit": "c0ffee", "sha256": {}}')
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert origin_of(tmp_path) == Origin("owner/name", "c0ffee", license) and origin_of(tmp_path).is_on_the_hub


def test_fetching_brings_the_card_with_the_licence(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(folders["roberta"], tmp_path / "c0ffee")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")

    def download(hub_id: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for path in snapshot.iterdir():
            if not any(path.match(pattern) for pattern in allow_patterns):
                path.unlink()
        return str(snapshot)

    monkeypatch.setattr(fetch, "snapshot_download", download)
    fetch_model("owner/name", tmp_path / "fetched")
    assert origin_of(tmp_path / "fetched").license == {"license": "mit"}
    model, _ = load_text_backbone(tmp_path / "fetched", "encoder")
    assert (model.name_or_path, model.config._commit_hash) == ("owner/name", "c0ffee")


def test_transformers_vit_uses_its_pooler(folders: dict[str, Path]) -> None:
    backbone = load_vision_backbone(folders["vit"])
    pixels = torch.randn(2, 3, 32, 32)
    pooled, patches, grid, whole = backbone.encode(pixels, TOKENS).values()
    output = ViTModel.from_pretrained(folders["vit"])(pixel_values=pixels)
    assert torch.equal(pooled, output.pooler_output) and torch.equal(patches, output.last_hidden_state[:, 1:])
    assert torch.equal(grid, patches) and torch.equal(whole, output.last_hidden_state)
    assert pooled.shape == (2, 16) and (backbone.tokens.shape("pooled"), backbone.tokens.shape("patches")) == ((1, 16), (16, 16))
    assert pooled.abs().max() <= 1  # tanh


def test_vision_models_without_pooler_give_the_cls_token(folders: dict[str, Path]) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    pooled = load_vision_backbone(folders["vit_without_pooler"]).encode(pixels, ["pooled"])["pooled"]
    reference = ViTModel.from_pretrained(folders["vit"])(pixel_values=pixels)
    assert torch.equal(pooled, reference.last_hidden_state[:, 0])


def test_timm_and_clip_folders(folders: dict[str, Path]) -> None:
    for name, size, patches in (("timm", 48, 36), ("resnet", 48, 36), ("clip", 32, 16)):
        backbone = load_vision_backbone(folders[name])
        pixels = backbone.transform(Image.new("RGB", (100, 60), "red"))
        assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32
        pooled, tokens, _, whole = backbone.encode(pixels[None], TOKENS).values()
        assert torch.equal(whole[:, -patches:], tokens) and whole.shape[1] == 1 + patches
        assert pooled.shape == (1, 16) and tokens.shape == (1, patches, 16) and backbone.tokens.shape("patches") == (patches, 16)
    assert len({fingerprint_of(folder) for folder in folders.values()}) == len(folders)


def test_which_tokens_a_model_gives_is_known_without_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("timm", "resnet", "vit", "clip"):
        copy = shutil.copytree(folders[name], tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        assert vision_tokens(copy).shapes == load_vision_backbone(folders[name]).tokens.shapes
    with pytest.raises(RoutevlError, match="a roberta model, not an image encoder"):
        vision_tokens(folders["roberta"])
    with pytest.raises(RoutevlError, match=r"nowhere.config\.json: no such file"):
        vision_tokens(tmp_path / "nowhere")


def test_what_a_pretraining_begins_with_tells_of_its_models_shapes(folders: dict[str, Path], tmp_path: Path) -> None:
    """By which the models of a run sheet are checked before any is made."""
    sizes = {"seed": 1, "epochs": 1, "hidden_size": 16, "layers": 1}
    pretrain_vision.write_untrained(tmp_path / "resnet", {**sizes, "architecture": "resnet", "images": 16})
    assert vision_tokens(tmp_path / "resnet").shapes == vision_tokens(folders["resnet"]).shapes
    pretrain_text.write_untrained(tmp_path / "bart", {**sizes, "architecture": "bart", "sentences": 40, "heads": 2})
    (untrained, tokenizer), (made, _) = (
        text_skeleton(folder, "encoder-decoder") for folder in (tmp_path / "bart", folders["bart"])
    )
    assert len(tokenizer) == untrained.config.vocab_size
    assert untrained.get_decoder().state_dict().keys() == made.get_decoder().state_dict().keys()
    assert [p.shape for p in untrained.get_decoder().layers.parameters()] == [
        p.shape for p in made.get_decoder().layers.parameters()
    ]


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_a_model_that_cannot_run_without_numbers_has_the_same_tokens(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whether or not it can, no random number is drawn: a training run that loads a vision model goes on as it would."""
    torch.manual_seed(1)
    state, given = torch.get_rng_state(), vision_tokens(folders[name])
    for source in (TimmFolder, TransformersFolder):
        output = source.output
        monkeypatch.setattr(
            source, "output", lambda self, model, pixels, run=output: run(self, model, pixels + pixels.max().item())
        )
    assert vision_tokens(folders[name]) == given
    assert torch.equal(torch.get_rng_state(), state)


def test_preprocessing_that_does_not_fit_the_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["clip"], tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(copy)
    with pytest.raises(
        RoutevlError, match=r"^backbone .*clip: its preprocessing makes \(3, 32, 42\) of a broad image and \(3, 42"
    ):
        load_vision_backbone(copy)
    copy = shutil.copytree(folders["vit"], tmp_path / "vit")
    ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(copy)
    with pytest.raises(
        RoutevlError, match=r"^backbone .*vit: cannot run on images of \(3, 40, 40\) \(Input image size [^\n]*\)$"
    ):
        load_vision_backbone(copy)


def test_fingerprint_follows_weights_and_preprocessing_only(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["vit"], tmp_path / "vit")
    before = fingerprint_of(folders["vit"])
    (copy / "README.md").write_text("a card")
    assert fingerprint_of(copy) == before
    preprocessor = copy / "preprocessor_config.json"
    preprocessor.write_text(preprocessor.read_text().replace("0.5", "0.4"))
    assert fingerprint_of(copy) != before


def test_the_grid_of_patches_is_pooled_to_six_a_side(tmp_path: Path) -> None:
    """Where it is larger, as the maxima of parts that overlap, which torch's own pooling takes as well."""
    options = ("--architecture", "resnet", "--patch-size", "8", "--image-size", "72", "--images", "8")
    backbone = load_vision_backbone(pretrain(pretrain_vision, tmp_path / "resnet", *options))
    _, patches, grid, whole = backbone.encode(torch.randn(2, 3, 72, 72), TOKENS).values()
    rows = patches.transpose(1, 2).unflatten(2, (9, 9))
    assert backbone.tokens.shape("grid") == (36, 16)
    assert torch.equal(grid, torch.nn.functional.adaptive_max_pool2d(rows, 6).flatten(2).transpose(1, 2))
    assert grid[0, 1].equal(patches.unflatten(1, (9, 9))[0, 0:2, 1:3].amax((0, 1)))
    assert torch.equal(whole[:, 1:], patches)  # there is no class token: their mean stands before them
    torch.testing.assert_close(whole[:, 0], patches.mean(1))


@pytest.mark.parametrize("side", [4, 7, 14, 17])
def test_a_grid_is_pooled_as_by_torch_with_the_same_gradient(side: int) -> None:
    """Whose own gradient is refused on GPUs, where a vision model is trained with deterministic kernels alone."""
    inputs = [torch.randn(2, side**2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    rows = inputs[1].transpose(1, 2).unflatten(2, (side, side))
    expected = torch.nn.functional.adaptive_max_pool2d(rows, min(side, 6)).flatten(2).transpose(1, 2)
    found = pooled_grid(inputs[0])
    assert torch.equal(found, expected)
    for pooled in (found, expected):
        pooled.pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_patches_of_images_that_are_not_square_are_no_grid(folders: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=(16, 64), patch_size=8)).save_pretrained(tmp_path)  # as many patches as 4 x 4 has
    ViTImageProcessor(size={"height": 16, "width": 64}).save_pretrained(tmp_path)
    tokens = vision_tokens(tmp_path)
    assert tokens.shape("patches") == (16, 16)
    with pytest.raises(RoutevlError, match="no grid tokens: its images have 16 x 64 pixels, so that [^\n]*; leave grid out of"):
        tokens.shape("grid")


# ------------------------------------------------------------------------------------------ another crop


def derived(source: Path, output: Path, *options: str) -> Path:
    parser = argparse.ArgumentParser()
    derive.add_arguments(parser)
    derive.run(parser.parse_args(["--by", "crop", "--source", str(source), "--output", str(output), "--options", *options]))
    return output


def test_a_squashed_image_is_seen_whole_without_its_aspect(folders: dict[str, Path], tmp_path: Path) -> None:
    """As OpenAI's CLIP is given it in CLIP-BART: resized to a square by bicubic interpolation, and not cropped."""
    source = shutil.copytree(folders["timm"], tmp_path / "timm")
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_pct": 0.9, "crop_mode": "center"}  # as timm's CLIP models have it
    (source / "config.json").write_text(json.dumps(config))
    squashed = derived(source, tmp_path / "squashed", "crop_mode=squash")
    pixels = numpy.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    backbone = load_vision_backbone(squashed)
    expected = torch.from_numpy(numpy.array(image.resize((48, 48), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config["pretrained_cfg"][name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(backbone.transform(image), (expected - mean) / std)
    assert not torch.equal(backbone.transform(image), load_vision_backbone(source).transform(image))
    assert backbone.fingerprint == fingerprint_of(squashed) != fingerprint_of(source)  # so features of the other crop are stale
    assert (squashed / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    [step] = origin_of(squashed).derivations
    assert step == {"by": "crop", "options": {"crop_mode": "squash", "crop_pct": 1.0}}


def test_a_crop_is_refused_where_it_is_not_timms(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("vit", "roberta"):
        with pytest.raises(RoutevlError, match=f"^backbone .*{name}: config.json has no pretrained_cfg, timm's preprocessing; "):
            derived(folders[name], tmp_path / "squashed", "crop_mode=squash")
    with pytest.raises(RoutevlError, match="crop_mode is 'stretch', expected one of center, squash, border"):
        derived(folders["timm"], tmp_path / "squashed", "crop_mode=stretch")
    assert not (tmp_path / "squashed").exists()


# ------------------------------------------------------------------------------------------ pretraining


@pytest.mark.parametrize(
    ("stage", "options", "name"),
    [
        (pretrain_text, ["--architecture", "roberta", "--sentences", "40"], "roberta"),
        (pretrain_text, ["--architecture", "gpt2", "--sentences", "40"], "gpt2"),
        (pretrain_text, ["--architecture", "bart", "--sentences", "40"], "bart"),
        (pretrain_vision, ["--images", "16"], "timm"),
        (pretrain_vision, ["--architecture", "resnet", "--images", "16"], "resnet"),
    ],
)
def test_pretraining_is_deterministic(
    folders: dict[str, Path], tmp_path: Path, stage: ModuleType, options: list[str], name: str
) -> None:
    again, first = pretrain(stage, tmp_path / "again", *options), folders[name]
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert json.loads((again / "pretraining.json").read_text())["held_out"]
    other_seed = pretrain(stage, tmp_path / "other", *options, "--seed", "2")
    assert (other_seed / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_infilling_leaves_all_but_some_spans(folders: dict[str, Path]) -> None:
    """30% of the tokens between the first and the last, in several spans and some of them of no tokens; the others in order."""
    generator, mask = numpy.random.default_rng(0), -1
    spans, empty = [], 0
    for length in [1, 2, 5, 10, 30] * 200:
        ids = list(range(length + 2))
        corrupted = without_spans(ids, mask, generator)
        kept = [token for token in corrupted if token != mask]
        assert kept == sorted(kept) and (corrupted[0], corrupted[-1]) == (ids[0], ids[-1])
        assert len(ids) - len(kept) == math.ceil(0.3 * length)
        spans.append(corrupted.count(mask))
        empty += any(corrupted[place - 1] + 1 == corrupted[place + 1] for place, token in enumerate(corrupted) if token == mask)
    assert min(spans) == 1 and max(spans) > 4 and empty > 20


def test_a_bart_learns_the_words_of_all_tasks() -> None:
    for count in (1, 2000):
        written = ARCHITECTURES["bart"].sentences(numpy.random.default_rng(0), count)
        assert len(written) == count
    assert {"yes", "no", "true", "false", "2", "red"} <= set(written)
    for words in ("what color is", "there is a", " or ", "the left image", "both images", "at least one of the images"):
        assert any(words in text for text in written), words


@pytest.mark.slow
def test_a_pretrained_bart_writes_what_its_encoder_reads(tmp_path: Path) -> None:
    """Which it does not where its decoder has only learnt what sentences are like: that gets two thirds of the tokens right."""
    options = ("--architecture", "bart", "--sentences", "5000", "--epochs", "2", "--batch-size", "32")
    sizes = ("--hidden-size", "96", "--layers", "2", "--heads", "4")
    folder = pretrain(pretrain_text, tmp_path / "bart", *options, *sizes)
    assert json.loads((folder / "pretraining.json").read_text())["held_out"]["token_accuracy"] > 0.8
    model, tokenizer = load_text_backbone(folder, "encoder-decoder")
    read = [("what color is the", " thing?"), ("the left image has a", " square."), ("both images have", " circle.")]
    batch = tokenizer(["<mask>".join(parts) for parts in read], padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=30, num_beams=1)
    assert written[:, :2].tolist() == [[2, 0]] * 3  # </s> <s>, as in training
    for (before, after), text in zip(read, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
        assert text.startswith(before) and text.endswith(after)


@pytest.mark.slow
def test_each_token_of_a_pretrained_resnet_tells_its_own_cell(tmp_path: Path) -> None:
    options = ("--architecture", "resnet", "--images", "8000", "--epochs", "2", "--patch-size", "16", "--learning-rate", "4e-3")
    folder = pretrain(pretrain_vision, tmp_path / "resnet", *options, "--hidden-size", "128", "--batch-size", "32")
    found = json.loads((folder / "pretraining.json").read_text())["held_out"]
    assert min(found.values()) > 0.9, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "8", "--patch-size", "7"], "--image-size 48 is not a multiple of --patch-size 7"),
        (["--images", "8", "--heads", "3"], "--hidden-size 16 is not a multiple of --heads 3"),
        (["--images", "64", "--epochs", "4", "--learning-rate", "1e30"], "set a lower --learning-rate"),
        (["--images", "8", "--learning-rate", "0"], "--learning-rate 0.0: expected a positive number"),
        (["--images", "8", "--architecture", "resnet", "--patch-size", "12"], "--patch-size 12: a resnet's is one of 8, 16, 32"),
        (
            ["--images", "8", "--architecture", "resnet", "--hidden-size", "24"],
            "--hidden-size 24: a resnet's is a multiple of 16",
        ),
    ],
)
def test_bad_pretraining_options(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(RoutevlError, match=message):
        pretrain(pretrain_vision, tmp_path / "vit", *options)
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize("option", ["images", "image-size", "patch-size", "epochs", "layers", "heads", "batch-size", "threads"])
def test_pretraining_options_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture, option: str) -> None:
    with pytest.raises(SystemExit):
        pretrain(pretrain_vision, tmp_path / "vit", "--images", "8", f"--{option}", "0")
    assert f"argument --{option}: 0 is no integer of 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "vit").exists()
