"""Images of another width than the text's: one projection, in the tuner where the method is one of this package's (B15)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import TEXT_MODELS, D, batch_of, build, one_step
from safetensors.torch import load_file

from routevl.methods.table import new_method

ALONE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from cases import *
from peft import PeftModel
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
for method in ("lora", "adapter"):
    for kind in ("roberta", "gpt2"):
        for prefix in (False, True):
            folder, batch = Path({folder!r}) / f"{{method}}-{{kind}}-{{prefix}}", batch_of(kind, width=20, visual_tokens=2)
            torch.manual_seed(0)
            model = PeftModel.from_pretrained(TEXT_MODELS[kind](), folder).eval()
            given = {{"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}}
            if prefix:
                projected = model.base_model.visual_projection["default"](batch["image"])
                given = {{"inputs_embeds": torch.cat([projected, given["inputs_embeds"]], 1)}}
            torch.save(model(**given, visual_features=batch["image"])[0], folder / "alone.pt")
"""


def test_b15_an_adapter_of_another_width_is_used_by_peft_alone(tmp_path: Path) -> None:
    """Trained in the workflow's model, loaded on a bare text model in a new process, given the vision model's own features; a
    prefix is made by the tuner's projection."""
    expected = {}
    for method in ("lora", "adapter"):
        for kind in ("roberta", "gpt2"):
            for prefix in (False, True):
                options = {"r": 4, "routing": "attn", "visual_scale": "tanh"}
                model, batch = build(method, kind, options, width=20, prefix=prefix), batch_of(kind, width=20, visual_tokens=2)
                start = model.visual_projection.weight.clone()
                for _ in range(3):
                    one_step(model, batch)
                assert not torch.equal(model.visual_projection.weight, start)
                folder = tmp_path / f"{method}-{kind}-{prefix}"
                model.save(folder)
                assert not [name for name in load_file(folder / "task.safetensors") if "visual" in name]
                inputs = model.text_inputs(batch["input_ids"], batch["attention_mask"], batch["image"])
                assert torch.equal(inputs["visual_features"], batch["image"])
                expected[folder] = model.text_model(**inputs)[0]
    script = ALONE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=300)
    for folder, output in expected.items():
        torch.testing.assert_close(torch.load(folder / "alone.pt", weights_only=True), output, msg=str(folder))


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_b15_a_baseline_and_its_routed_twin_start_alike(method: str, kind: str) -> None:
    """The same draws, of the same number, whichever of the two has the projection; so do methods that cannot have it."""
    twins = [build(method, kind, {"r": 4, "routing": routing}, width=20) for routing in ("none", "mul")]
    counts = [twin.trainable_params_by_part() for twin in twins]
    assert counts[0] == counts[1] and counts[0]["visual_projection"] == 20 * D + D
    assert build("bitfit", kind, {}, width=20).trainable_params_by_part()["visual_projection"] == 20 * D + D
    baseline, routed = ({n.replace("text_model.base_model.visual_projection.default", "visual_projection"): t
                         for n, t in twin.tensors().items()} for twin in twins)  # fmt: skip
    assert baseline.keys() == routed.keys()
    assert all(torch.equal(tensor, routed[name]) for name, tensor in baseline.items())


def test_b15_equal_widths_have_no_projection_and_draw_nothing() -> None:
    for routing in ("none", "mul"):
        model = build("lora", "roberta", {"r": 4, "routing": routing})
        assert model.trainable_params_by_part()["visual_projection"] == 0 and not [*model.visual_projection.parameters()]
        torch.manual_seed(0)
        text_model = TEXT_MODELS["roberta"]().requires_grad_(False)
        method = new_method("lora", {"r": 4, "routing": routing}, "test")
        built = method.build(text_model, {}, [])
        assert all(torch.equal(tensor, method.tensors(model.text_model)[n]) for n, tensor in method.tensors(built).items())
