"""Data sites and a hub of models on this machine, at toy size, for the tests that run whole configurations from nothing."""

from __future__ import annotations

import csv
import functools
import http.server
import json
import re
import subprocess
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import run_stage
from tiny_project import BIN, environment


def write_coco(root: Path) -> None:
    """The demo world's images and texts as the official archives; part of its train images is Karpathy's restval."""
    from PIL import Image

    run_stage("world", "--output", root / "world", "--seed", 1, "--train-images", 40, "--val-images", 8, "--test-images", 12,
              "--image-size", 48, "--questions-per-image", 3)  # fmt: skip
    year: dict[int, str] = {}
    splits, records = [], {"questions": [], "annotations": [], "captions": []}
    for split in ("train", "val", "test"):
        folder = root / "world" / split
        for name, content in records.items():
            content += json.loads((folder / f"{name}.json").read_text())["annotations" if name == "captions" else name]
        for number, file in enumerate(sorted((folder / "images").iterdir())):
            image_id = int(re.search(r"(\d{12})", file.name)[1])
            restval = split == "train" and number < 10
            year[image_id] = "train2014" if split == "train" and not restval else "val2014"
            name = f"COCO_{year[image_id]}_{image_id:012d}.jpg"
            (root / year[image_id]).mkdir(exist_ok=True)
            Image.open(file).convert("L" if number == 3 else "RGB").save(root / year[image_id] / name)
            own_split = "restval" if restval else split
            splits.append({"cocoid": image_id, "filename": name, "filepath": year[image_id], "split": own_split})
    for name in ("train2014", "val2014"):
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for file in sorted((root / name).iterdir()):
                archive.write(file, f"{name}/{file.name}")
    with zipfile.ZipFile(root / "caption_datasets.zip", "w") as archive:
        archive.writestr("dataset_coco.json", json.dumps({"images": splits, "dataset": "coco"}))
    with zipfile.ZipFile(root / "annotations_trainval2014.zip", "w") as archive:
        for name in ("train2014", "val2014"):
            images = [{"id": entry["cocoid"], "file_name": entry["filename"]} for entry in splits if entry["filepath"] == name]
            content = {"images": images, "annotations": of_year(records["captions"], year, name), "licenses": [], "info": {}}
            archive.writestr(f"annotations/captions_{name}.json", json.dumps(content))
    for part, name in (("Train", "train2014"), ("Val", "val2014")):
        members = {"questions": f"v2_OpenEnded_mscoco_{name}_questions", "annotations": f"v2_mscoco_{name}_annotations"}
        for kind, member in members.items():
            with zipfile.ZipFile(root / f"v2_{kind.title()}_{part}_mscoco.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{member}.json", json.dumps({kind: of_year(records[kind], year, name)}))


def of_year(records: list[dict[str, Any]], year: dict[int, str], name: str) -> list[dict[str, Any]]:
    return [record for record in records if year[record["image_id"]] == name]


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address at which a folder is served over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def download_from(sites: str, folder: Path) -> None:
    """Let a project's table of archives name those that have addresses at one of this machine, without checksums."""
    path = folder / "config/datasets.tsv"
    columns, rows = read_table(path)
    here = [row | {"urls": row["urls"] and f"{sites}/{row['file']}", "checksum": "", "bytes": ""} for row in rows]
    write_table(path, columns, here)


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


def fill_hub(home: Path, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a cache of the Hugging Face hub with a configuration's models, in other shapes and of random weights."""
    entries = {**config["backbones"]["text"], **config["backbones"]["vision"]}
    for name, shape in shapes.items():
        entry = entries[name]
        folder = home / "hub" / f"models--{entry['path'].replace('/', '--')}"
        commit = entry.get("revision", "0" * 40)
        save_model(name, shape, folder / "snapshots" / commit)
        if "revision" not in entry:
            (folder / "refs").mkdir()
            (folder / "refs/main").write_text(commit)
    return home


def save_model(name: str, shape: Mapping[str, Any], folder: Path) -> None:
    import timm
    import transformers
    from timm.models import save_for_hf

    from routevl.backbones.pretrain_text import byte_pairs

    texts = ["what colour is the circle", "a red square left of a blue cross"]
    if name.startswith("vit"):
        transformers.ViTModel(transformers.ViTConfig(**shape)).save_pretrained(folder)
        transformers.ViTImageProcessor().save_pretrained(folder)
        return
    if name.startswith("clip"):
        model = timm.create_model("resnet101_clip.openai", pretrained=False, **shape)
        save_for_hf(model, str(folder), model_args=dict(shape), safe_serialization=True)
        return
    if name.startswith("bart"):
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = transformers.BartTokenizer(**byte_pairs(texts, 300, special), model_max_length=1024)
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape, vocab_size=len(tokenizer)))
    elif name.startswith("roberta"):
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
    """Run a project's configuration to success; returns what Snakemake printed."""
    status, output = attempt(folder, hub, configuration, *options)
    assert status == 0, output
    return output


def attempt(folder: Path, hub: Path, configuration: str, *options: str) -> tuple[int, str]:
    """Run a project's configuration from the hub's cache alone; returns Snakemake's exit status, and what it printed."""
    command = [str(BIN / "snakemake"), "--cores", "2", "--show-failed-logs", *options, "--configfile", configuration]
    offline = environment() | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True, timeout=900)
    return result.returncode, result.stdout + result.stderr
