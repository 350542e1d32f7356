"""Data sites and a hub of models on this machine, at toy size, for the tests that run whole configurations from nothing."""

from __future__ import annotations

import csv
import functools
import http.server
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_project import BIN, environment


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address at which a folder is served over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download_from(sites: str, folder: Path) -> None:
    """Let a project's table of archives name them at an address of this machine, without checksums."""
    path = folder / "config/datasets.tsv"
    columns, rows = read_table(path)
    write_table(path, columns, [row | {"urls": f"{sites}/{row['file']}", "checksum": "", "bytes": ""} for row in rows])


def read_table(path: Path) -> tuple[Any, list[dict[str, str]]]:
    """Columns and rows of a tab-separated table."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows = list(reader)
        return reader.fieldnames, rows


def write_table(path: Path, columns: Any, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def fill_hub(home: Path, config: Mapping[str, Any], shapes: Mapping[str, dict[str, int]]) -> Path:
    """Write a cache of the Hugging Face hub with a configuration's pinned models, in other shapes and of random weights."""
    entries = {**config["backbones"]["text"], **config["backbones"]["vision"]}
    for name, shape in shapes.items():
        entry = entries[name]
        save_model(name, shape, home / "hub" / f"models--{entry['path'].replace('/', '--')}" / "snapshots" / entry["revision"])
    return home


def save_model(name: str, shape: dict[str, int], folder: Path) -> None:
    import transformers

    from routevl.backbones.pretrain_text import byte_pairs

    texts = ["what colour is the circle", "a red square left of a blue cross"]
    if name.startswith("vit"):
        transformers.ViTModel(transformers.ViTConfig(**shape)).save_pretrained(folder)
        transformers.ViTImageProcessor().save_pretrained(folder)
        return
    if name.startswith("roberta"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = transformers.RobertaTokenizer(**byte_pairs(texts, 300, special), model_max_length=512)
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 514, "type_vocab_size": 1}
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**shape, **sizes))
    else:
        tokenizer = transformers.GPT2Tokenizer(**byte_pairs(texts, 300, ["<|endoftext|>"]), model_max_length=1024)
        sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **sizes))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def snakemake(folder: Path, hub: Path, configuration: str, *options: str) -> str:
    """Run a project's configuration, to success, from the hub's cache alone; returns what Snakemake printed."""
    command = [str(BIN / "snakemake"), "--cores", "2", "--show-failed-logs", "--configfile", configuration, *options]
    offline = environment() | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
