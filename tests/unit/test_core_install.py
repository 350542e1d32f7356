"""The core alone, as `pip install .` brings it, is enough for the methods; everything else says which extra it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
MINORS = range(8, 21)  # of Python 3


def closure(requirements: list[str], extra: str = "") -> set[str]:
    """Names of all distributions that pip would install for the requirements of a distribution with one of its extras."""
    names: set[str] = set()
    waiting = [(requirement, extra) for requirement in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        names.add(name := canonicalize_name(requirement.name))
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(further, wanted) for further in distribution(name).requires or []]
    return names


def site_packages(site: Path, requirements: list[str]) -> Path:
    """A folder like the site-packages of a fresh environment: this package and what it requires, as links.

    A part of this environment stands for a new one, which would take minutes and a network.
    """
    site.mkdir()
    for name in closure(requirements) | {"routevl"}:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
    (site / "routevl").symlink_to(REPOSITORY / "src" / "routevl")
    return site


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_packages(tmp_path_factory.mktemp("core") / "site", PROJECT["dependencies"])


def python(site: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the packages of a site and no others (-S), and without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ROUTEVL"))}
    environment |= {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    return subprocess.run([sys.executable, "-S", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def routevl(site: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python(site, "-c", "from routevl.cli import main; main()", *arguments, folder=folder)


def test_only_the_core_is_there(core: Path, tmp_path: Path) -> None:
    look = "from importlib.util import find_spec; print([name for name in ('peft', 'datasets', 'pytest') if find_spec(name)])"
    assert python(core, "-c", look, folder=tmp_path).stdout == "['peft']\n"


ADAPT_SAVE_LOAD = """
import routevl.methods
import torch
from peft import PeftModel, get_peft_model
from routevl.methods import RoutedAdapterConfig, RoutedLoraConfig
from transformers import RobertaConfig, RobertaModel

def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaModel(RobertaConfig(vocab_size=40, max_position_embeddings=20, **sizes), add_pooling_layer=False)

inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "visual_features": torch.randn(1, 2, 16)}
for config in (RoutedLoraConfig(r=2, routing="attn"), RoutedAdapterConfig(r=2, routing="mul")):
    model = get_peft_model(roberta(), config)
    model(**inputs).last_hidden_state.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1)
    folder = config.peft_type
    model.eval().save_pretrained(folder)
    again = PeftModel.from_pretrained(roberta(), folder).eval()
    assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
"""


def test_methods_train_save_and_load_with_the_core_alone(core: Path, tmp_path: Path) -> None:
    ended = python(core, "-c", ADAPT_SAVE_LOAD, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_the_first_example_of_the_readme_runs_with_the_core_alone(core: Path, tmp_path: Path) -> None:
    example = re.search(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert example
    ended = python(core, "-c", example[1], folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {f"# {line}" for line in ended.stdout.splitlines()} <= set(example[1].splitlines())  # it shows what it prints


def test_the_command_line_works_with_the_core_alone(core: Path, tmp_path: Path) -> None:
    assert "caption-score" in routevl(core, "--help", folder=tmp_path).stdout
    assert "lora" in routevl(core, "methods", folder=tmp_path).stdout
    assert json.loads(routevl(core, "methods", "--json", folder=tmp_path).stdout)


@pytest.fixture
def captions(tmp_path: Path) -> list[str]:
    """A command that scores a caption."""
    caption = {"image_id": 1, "caption": "a red circle"}
    truth = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, **caption}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps([caption]))
    return ["caption-score", "--annotations", "truth.json", "--results", "results.json"]


def test_captions_are_scored_with_the_core_and_its_metrics(captions: list[str], tmp_path: Path) -> None:
    metrics = site_packages(tmp_path / "site", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["metrics"]])
    ended = routevl(metrics, *captions, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "METEOR" in ended.stdout


WORLD = "world --seed 1 --train-images 1 --val-images 1 --test-images 1 --image-size 24 --questions-per-image 1 --output world"


def test_a_stage_says_which_extra_has_the_library_that_it_lacks(core: Path, captions: list[str], tmp_path: Path) -> None:
    for command, extra in ((WORLD.split(), "workflow"), (captions, "metrics")):
        ended = routevl(core, *command, folder=tmp_path)
        assert ended.returncode == 2
        assert re.fullmatch(rf"routevl: error: {command[0]} needs \w+: pip install 'routevl\[{extra}\]'\n", ended.stderr)


def test_every_part_names_the_same_pythons() -> None:
    allowed = [f"3.{minor}" for minor in MINORS if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]
    classified = [words[2] for entry in PROJECT["classifiers"] if len(words := entry.split(" :: ")) == 3]
    makefile = re.search(r"^PYTHONS := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert makefile
    assert allowed == classified == makefile[1].split() == ["3.11", "3.12", "3.13"]
