"""docs/OWN.md, run as it is printed: its files are written, its commands executed, in a copy of the project."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tiny_project import BIN, PROJECT, copy_project, environment
from transformers import BertConfig, BertModel, BertTokenizerFast

DOCUMENT = (PROJECT / "docs/OWN.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`(own/[\w.]+)`[^\n]*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MINILM = re.compile(r"path: (\S+/\S+)\n\s+revision: (\S+)")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache of the hub that has the document's model, small and with random weights."""
    name, revision = MINILM.search(DOCUMENT).groups()
    snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"what colour is the sky ? there a ball".split()]  # noqa: SIM905
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(config).save_pretrained(snapshot)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(snapshot)
    return tmp_path


@pytest.mark.slow
def test_the_example_runs_as_it_is_printed(tmp_path: Path, hub: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    copy_project(project)
    (project / "Makefile").write_bytes((PROJECT / "Makefile").read_bytes())
    (project / ".venv").symlink_to(BIN.parent)
    (project / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    files = dict(FILE.findall(DOCUMENT))
    assert files.keys() == {f"own/{name}" for name in
                            ("pictures.py", "convert.py", "models.py", "own.yaml", "own.tsv", "new.py")}  # fmt: skip
    (project / "own").mkdir()
    for name, content in files.items():
        (project / name).write_text(content)
    first, second = COMMANDS.findall(DOCUMENT)
    variables = environment() | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    for commands in (first, second):
        done = subprocess.run(["bash", "-ec", commands.replace("make plan", "make -o .venv/.complete plan")], cwd=project,
                              env=variables, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    answers, captions = (json.loads((project / f"own/new/{kind}/results.json").read_text()) for kind in ("answers", "captions"))
    assert [entry["question_id"] for entry in answers] == [entry["image_id"] for entry in captions] == [1]
    vocabulary = json.loads((project / "own/results/data/answers.json").read_text())
    assert sorted(vocabulary) == ["blue", "green", "no", "red", "yes"] and answers[0]["answer"] in vocabulary
    table = (project / "own/results/tables/T1_vqa.md").read_text()
    assert "mul" in table and "nan" not in table.lower()
    checked = json.loads((project / "own/results/checked_models.json").read_text())["checked"]
    assert {entry["text_backbone"] for entry in checked} == {"minilm", "mine"}
