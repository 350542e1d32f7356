"""Sources of GQA and NLVR2: the ids of images that have names, their files, their splits, and what is prepared of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_stage
from test_data import REFERENCE, captions_file, image_ids_of, needs_reference, prepare_run, save

from routevl.data.gqa import read_questions
from routevl.data.nlvr2 import read_examples
from routevl.data.sources import stable_id
from routevl.errors import RoutevlError
from routevl.files import read_json

SPLITS = ("train", "val", "test")
THIRDS = {"train": 0.5, "val": 0.25, "test": 0.25, "seed": 1}


def question(image: str, **changed: Any) -> dict[str, Any]:
    """A question as GQA's files have it, with a field that nothing reads."""
    types = {"structural": "verify", "semantic": "obj", "detailed": "exist"}
    fields = {"question": f"is it {image}?", "imageId": image, "answer": "yes", "isBalanced": True, "types": types, "groups": {}}
    return {name: value for name, value in (fields | changed).items() if value is not None}


def example(identifier: str, **changed: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": f"it is {identifier}.", "label": "True", "writer": "61"} | changed


def pairs(of_set: int, count: int = 2, split: str = "train") -> list[dict[str, Any]]:
    """Two sentences about each of some pairs of images."""
    return [example(f"{split}-{of_set}-{pair}-{sentence}") for sentence in (0, 1) for pair in range(count)]


def names_of(examples: Iterable[dict[str, Any]]) -> list[str]:
    stems = (entry["identifier"].rpartition("-")[0] for entry in examples)
    return [f"{stem}-img{side}.png" for stem in stems for side in (0, 1)]


def touch(folder: Path, names: Iterable[str]) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return str(folder)


def gqa_source(folder: Path, questions: dict[str, Any], split: Any = THIRDS, **changed: Any) -> dict[str, Any]:
    """A source of these questions and their images, in a folder of its own."""
    images = touch(folder / "images", (f"{entry['imageId']}.jpg" for entry in questions.values()))
    return {"images": images, "gqa": str(save(folder / "gqa.json", questions)), "split": split} | changed


def nlvr2_source(folder: Path, examples: list[dict[str, Any]], split: Any = THIRDS, **changed: Any) -> dict[str, Any]:
    images = touch(folder / "images", names_of(examples))
    path = folder / "nlvr2.json"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in examples))
    return {"images": images, "nlvr2": str(path), "split": split} | changed


def eight_questions() -> dict[str, Any]:
    return {f"{n:08d}": question(f"n{n}") for n in range(8)}


def prepared_questions(data: Path) -> dict[str, Any]:
    return {name: entry for split in SPLITS for name, entry in read_questions(data / split / "gqa.json").items()}


def prepared_examples(data: Path) -> dict[str, Any]:
    return {entry.identifier: entry for split in SPLITS for entry in read_examples(data / split / "nlvr2.jsonl")}


def files_by_id(data: Path) -> dict[int, Path]:
    return {image["id"]: Path(image["file_name"]) for split in SPLITS for image in read_json(data / split / "images.json")}


# ------------------------------------------------------------------------------------------------ the demo world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    images = ("--train-images", 12, "--val-images", 4, "--test-images", 6)
    run_stage("world", "--output", folder, "--seed", 3, *images, "--image-size", 24, "--questions-per-image", 2)
    return folder


def world_sources(world: Path, *kinds: str) -> list[dict[str, Any]]:
    files = {"gqa": "gqa_questions.json", "nlvr2": "nlvr2.jsonl"}
    return [
        {"split": split, "images": str(world / split / "images")}
        | {kind: str(world / split / files.get(kind, f"{kind}.json")) for kind in kinds}
        for split in SPLITS
    ]


def test_the_demo_worlds_images_have_one_id_in_all_data_sets(world: Path, tmp_path: Path) -> None:
    usual = ("questions", "annotations", "captions")
    prepare_run(tmp_path / "data", world_sources(world, *usual, "gqa", "nlvr2"))
    prepare_run(tmp_path / "usual", world_sources(world, *usual))
    for split in SPLITS:
        data, source = tmp_path / "data" / split, world / split
        for name in ("images", *usual):
            assert (data / f"{name}.json").read_bytes() == (tmp_path / "usual" / split / f"{name}.json").read_bytes()
        assert (tmp_path / "usual" / split / "gqa.json").read_text() == "{}\n"
        assert (tmp_path / "usual" / split / "nlvr2.jsonl").read_text() == ""
        ids = {Path(image["file_name"]).name: image["id"] for image in read_json(data / "images.json")}
        official = read_questions(source / "gqa_questions.json")
        prepared = read_questions(data / "gqa.json")
        assert list(prepared) == list(official) and len(prepared) == 3 * len(ids)
        for name, entry in official.items():
            kept = {field: entry[field] for field in ("question", "imageId", "answer", "isBalanced", "types")}
            assert prepared[name] == kept | {"image_id": ids[f"{entry['imageId']}.png"]}
        lines = read_examples(data / "nlvr2.jsonl")
        assert [e[:3] for e in lines] == [e[:3] for e in read_examples(source / "nlvr2.jsonl")]
        assert [e.image_ids for e in lines] == [
            (ids[e.left[-1]], ids[e.right[-1]]) for e in read_examples(source / "nlvr2.jsonl")
        ]


def test_the_demo_worlds_gqa_and_nlvr2_alone(world: Path, tmp_path: Path) -> None:
    """Without captions their images have ids of their names; one file may be an image of both."""
    prepare_run(tmp_path / "data", world_sources(world, "gqa", "nlvr2"))
    files = files_by_id(tmp_path / "data")
    for entry in prepared_questions(tmp_path / "data").values():
        assert entry["image_id"] == stable_id("gqa", entry["imageId"])
        assert files[entry["image_id"]].stem == entry["imageId"]
    for entry in prepared_examples(tmp_path / "data").values():
        assert list(entry.image_ids) == [stable_id("nlvr2", files[image_id].stem) for image_id in entry.image_ids]


def test_few_keeps_whole_examples_and_what_is_about_their_images(world: Path, tmp_path: Path) -> None:
    sources = world_sources(world, "questions", "annotations", "captions", "gqa", "nlvr2")
    prepare_run(tmp_path / "all", sources)
    prepare_run(tmp_path / "few", sources, "--minimum-answer-count", "1", "--few", "1")
    for split in SPLITS:
        kept = set(image_ids_of(tmp_path / "few" / split))
        few, every = (read_questions(tmp_path / name / split / "gqa.json") for name in ("few", "all"))
        assert few == {name: entry for name, entry in every.items() if entry["image_id"] in kept}
        longest = max(every.values(), key=lambda entry: len(entry["question"]))
        assert {next(iter(every.values()))["image_id"], longest["image_id"]} <= kept
        few, every = (read_examples(tmp_path / name / split / "nlvr2.jsonl") for name in ("few", "all"))
        assert few == [entry for entry in every if set(entry.image_ids) <= kept]
        assert every[0] in few and max(every, key=lambda entry: len(entry.sentence)) in few
    assert len(image_ids_of(tmp_path / "few" / "train")) < 12


# ------------------------------------------------------------------------------------------------ ids


def test_an_id_is_made_of_the_name_alone() -> None:
    """Stored features, predictions and scores go by these ids: they may not change from one version to the next."""
    assert stable_id("gqa", "2370799") == 2974827950249087
    assert stable_id("nlvr2", "dev-850-0-img0") == 3477307780578665
    assert len({stable_id("gqa", str(n)) for n in range(10_000)}) == 10_000
    assert 2**51 < max(stable_id("gqa", str(n)) for n in range(100)) < 2**52


def test_other_sources_and_other_layouts_change_no_id(tmp_path: Path) -> None:
    questions, examples = eight_questions(), [entry for of_set in range(8) for entry in pairs(of_set)]
    gqa, nlvr2 = gqa_source(tmp_path / "gqa", questions), nlvr2_source(tmp_path / "nlvr2", examples)
    prepare_run(tmp_path / "gqa alone", [gqa])
    prepare_run(tmp_path / "both", [nlvr2, gqa])
    assert prepared_questions(tmp_path / "both") == prepared_questions(tmp_path / "gqa alone")

    in_folders = [entry | {"directory": int(entry["identifier"].split("-")[1]) % 3} for entry in examples]
    layout = nlvr2_source(tmp_path / "folders", in_folders)
    for entry in in_folders:
        for name in names_of([entry]):
            target = Path(layout["images"]) / str(entry["directory"]) / f"{name.removesuffix('png')}JPEG"
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                (Path(layout["images"]) / name).rename(target)
    prepare_run(tmp_path / "in folders", [layout])
    assert prepared_examples(tmp_path / "in folders") == prepared_examples(tmp_path / "both")
    assert {file.suffix for file in files_by_id(tmp_path / "in folders").values()} == {".JPEG"}


def test_a_file_keeps_the_id_that_it_has_by_captions_or_an_image_list(tmp_path: Path) -> None:
    """Also by those of another source, and under another path."""
    gqa = [gqa_source(tmp_path / split, {f"{split}{n}": question(f"{split}{n}") for n in range(3)}, split) for split in SPLITS]
    listed = [{"id": 77, "file_name": "val2.jpg"}, {"id": 78, "file_name": "nowhere.jpg"}]
    gqa[1]["image_list"] = str(save(tmp_path / "list.json", listed))
    captioned = []
    for number, source in enumerate(gqa):
        (link := tmp_path / f"link{number}").symlink_to(source["images"])
        content = captions_file([number], first_id=number)
        content["images"][0]["file_name"] = f"{source['split']}1.jpg"
        captions = str(save(tmp_path / f"captions{number}.json", content))
        captioned.append({"images": str(link), "captions": captions, "split": source["split"]})
    prepare_run(tmp_path / "data", [*gqa, *captioned])
    ids = {entry["imageId"]: entry["image_id"] for entry in prepared_questions(tmp_path / "data").values()}
    assert ids == {name: stable_id("gqa", name) for name in ids} | {"train1": 0, "val1": 1, "test1": 2, "val2": 77}
    assert len(ids) == len(files_by_id(tmp_path / "data")) == 9


def test_two_files_with_one_id(tmp_path: Path) -> None:
    examples = [example("train-1-0-0", left_url="a/x.png", right_url="b/x.png")]
    source = nlvr2_source(tmp_path / "nlvr2", examples, "train")
    for name in names_of(examples):
        (Path(source["images"]) / name).unlink()
    touch(Path(source["images"]), ("a/x.png", "b/x.png"))
    with pytest.raises(RoutevlError, match=r"b/x\.png: would get the id \d+, which .*a/x\.png has; .*image_list"):
        prepare_run(tmp_path / "data", [source])
    source["image_list"] = str(
        save(tmp_path / "list.json", [{"id": 1, "file_name": "a/x.png"}, {"id": 2, "file_name": "b/x.png"}])
    )
    with pytest.raises(RoutevlError, match="the split 'val' has no images"):
        prepare_run(tmp_path / "data", [source])


# ------------------------------------------------------------------------------------------------ files


def test_missing_images_are_an_error_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a pair whose one image is missing nothing is left, also not the other image."""
    source = nlvr2_source(tmp_path / "nlvr2", [entry for of_set in range(8) for entry in pairs(of_set)])
    (Path(source["images"]) / "train-3-1-img1.png").unlink()
    with pytest.raises(RoutevlError) as error:
        prepare_run(tmp_path / "data", [source])
    for part in ("images: train-3-1-img1.png (or another ending of images): no such image", "nlvr2.json", "1 of 32 images"):
        assert part in str(error.value)
    prepare_run(tmp_path / "data", [source | {"missing_images": "drop"}])
    assert "dropped what is about 1 of 32 images" in capsys.readouterr().out
    assert len(prepared_examples(tmp_path / "data")) == 30
    assert len(files_by_id(tmp_path / "data")) == 30


def test_missing_images_of_gqa(tmp_path: Path) -> None:
    source = gqa_source(tmp_path / "gqa", eight_questions())
    (Path(source["images"]) / "n3.jpg").unlink()
    with pytest.raises(RoutevlError, match=r"n3\.jpg \(or another ending of images\): no such image, but .*gqa\.json refers to"):
        prepare_run(tmp_path / "data", [source])
    touch(Path(source["images"]), ("n3.txt",))
    prepare_run(tmp_path / "data", [source | {"missing_images": "drop"}])
    assert len(prepared_questions(tmp_path / "data")) == 7


def test_two_files_that_may_be_an_image(tmp_path: Path) -> None:
    """The ending that the data set gives decides."""
    source = gqa_source(tmp_path / "gqa", eight_questions())
    touch(Path(source["images"]), ("n3.webp",))
    prepare_run(tmp_path / "data", [source])
    assert Path(source["images"]) / "n3.jpg" in files_by_id(tmp_path / "data").values()
    (Path(source["images"]) / "n3.jpg").rename(Path(source["images"]) / "n3.gif")
    with pytest.raises(RoutevlError, match=r"n3\.gif and n3\.webp may both be the image n3\.jpg; move one away"):
        prepare_run(tmp_path / "data", [source])


def test_the_first_images_in_the_order_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gqa = gqa_source(tmp_path / "gqa", eight_questions() | {"late": question("n0")}, max_images=4)
    nlvr2 = nlvr2_source(tmp_path / "nlvr2", [entry for of_set in range(8) for entry in pairs(of_set)], max_images=19)
    prepare_run(tmp_path / "data", [gqa, nlvr2])
    assert "kept what is about the first 4 of 8 images" in capsys.readouterr().out
    questions = prepared_questions(tmp_path / "data")
    assert {entry["imageId"] for entry in questions.values()} == {"n0", "n1", "n2", "n3"} and "late" in questions
    examples = prepared_examples(tmp_path / "data")
    assert {name.split("-")[1] for name in examples} == {"0", "1", "2", "3", "4"} and len(examples) == 18  # half a pair is none


# ------------------------------------------------------------------------------------------------ splits


def test_fractions_take_no_set_of_nlvr2_apart(tmp_path: Path) -> None:
    source = nlvr2_source(tmp_path / "nlvr2", [entry for of_set in range(40) for entry in pairs(of_set, count=3)])
    prepare_run(tmp_path / "data", [source])
    sets = {split: {entry.statement[1] for entry in read_examples(tmp_path / "data" / split / "nlvr2.jsonl")} for split in SPLITS}
    assert {split: len(numbers) for split, numbers in sets.items()} == {"train": 20, "val": 10, "test": 10}
    assert len(set.union(*sets.values())) == 40 and len(prepared_examples(tmp_path / "data")) == 240
    prepare_run(tmp_path / "again", [source])
    prepare_run(tmp_path / "other", [source | {"split": THIRDS | {"seed": 2}}])
    assert image_ids_of(tmp_path / "again" / "test") == image_ids_of(tmp_path / "data" / "test")
    assert image_ids_of(tmp_path / "other" / "test") != image_ids_of(tmp_path / "data" / "test")


def test_fractions_of_sets_that_share_an_image(tmp_path: Path) -> None:
    examples = [example(f"train-{n}-0-0", left_url="x.png") for n in (1, 2)]
    source = nlvr2_source(tmp_path / "nlvr2", examples)
    for name in names_of(examples)[::2]:
        (Path(source["images"]) / name).unlink()
    touch(Path(source["images"]), ("x.png",))
    with pytest.raises(RoutevlError, match=r"x\.png is in the sets train-1 and train-2, .* give the source one split"):
        prepare_run(tmp_path / "data", [source])


def test_records_keep_the_order_of_their_files(tmp_path: Path) -> None:
    questions = {name: question("n1") for name in ("9", "05", "5", "1")}
    rest = [gqa_source(tmp_path / split, {split: question(split)}, split) for split in ("val", "test")]
    prepare_run(tmp_path / "data", [gqa_source(tmp_path / "train", questions, "train"), *rest])
    assert list(read_json(tmp_path / "data" / "train" / "gqa.json")) == ["9", "05", "5", "1"]


def test_an_image_in_two_splits(tmp_path: Path) -> None:
    source = gqa_source(tmp_path / "gqa", eight_questions(), "train")
    other = source | {"gqa": str(save(tmp_path / "other.json", {"1": question("n1")})), "split": "test"}
    with pytest.raises(RoutevlError, match=r"n1\.jpg .* is both in train and in test"):
        prepare_run(tmp_path / "data", [source, other])


def test_one_image_in_two_folders(tmp_path: Path) -> None:
    sources = [gqa_source(tmp_path / name, {name: question("n1")}, "train") for name in ("a", "b")]
    with pytest.raises(
        RoutevlError, match=r"the image id \d+ is .*a/images/n1\.jpg in one source, but .*b/images/n1\.jpg in another; leave out"
    ):
        prepare_run(tmp_path / "data", sources)


def test_ids_that_are_there_twice(tmp_path: Path) -> None:
    gqa = gqa_source(tmp_path / "gqa", eight_questions())
    with pytest.raises(RoutevlError, match="the question 0000000. is there twice, in .*gqa.json and in .*; leave out"):
        prepare_run(tmp_path / "data", [gqa, gqa])
    nlvr2 = nlvr2_source(tmp_path / "nlvr2", [entry for of_set in range(8) for entry in pairs(of_set)])
    with pytest.raises(RoutevlError, match="the identifier train-.* is there twice, in .*nlvr2.json and in .*; leave out"):
        prepare_run(tmp_path / "data", [nlvr2, nlvr2])


@pytest.mark.parametrize(("kind", "word"), [("gqa", "GQA questions"), ("nlvr2", "NLVR2 examples")])
def test_a_split_that_lacks_what_the_others_have(world: Path, tmp_path: Path, kind: str, word: str) -> None:
    sources = world_sources(world, "captions", "gqa", "nlvr2")
    del sources[1][kind]
    with pytest.raises(RoutevlError, match=f"--sources: the split 'val' has no {word}"):
        prepare_run(tmp_path / "data", sources)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gqa": None}, "a source needs captions, or questions and annotations, or gqa, or nlvr2"),
        ({"gqa": 3}, r"data\[0\]\.gqa must be string"),
        ({"gqa": "nowhere.json"}, "nowhere.json: no such file"),
        ({"gqa": None, "nlvr2": "nowhere.json"}, "nowhere.json: no such file"),
        ({"id_offset": 5}, "id_offset: of no use with gqa or nlvr2"),
        ({"split": {"karpathy": "dataset_coco.json"}}, "split karpathy: names no images of gqa or nlvr2"),
    ],
)
def test_wrong_sources(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    source = gqa_source(tmp_path / "gqa", eight_questions()) | changed
    with pytest.raises(RoutevlError, match=message) as error:
        prepare_run(tmp_path / "data", [{key: value for key, value in source.items() if value is not None}])
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


def test_questions_without_answers_are_no_source(tmp_path: Path) -> None:
    source = gqa_source(tmp_path / "gqa", eight_questions() | {"201": question("n1", answer=None, types=None)})
    with pytest.raises(RoutevlError, match=r"gqa\.json: the question 201 has no answer: .* reported on testdev"):
        prepare_run(tmp_path / "data", [source])


# ------------------------------------------------------------------------------------------------ reference data


@needs_reference
def test_the_official_dev_file_is_split_by_its_sentences(tmp_path: Path) -> None:
    """With a file for each of its images: all examples, and each of the 2,018 sentences in one split."""
    path = REFERENCE / "nlvr2/dev.json.gz"
    official = read_examples(path)
    images = touch(tmp_path / "images", {name for entry in official for name in (entry.left[0], entry.right[0])})
    prepare_run(tmp_path / "data", [{"images": images, "nlvr2": str(path), "split": THIRDS}])
    assert prepared_examples(tmp_path / "data").keys() == {entry.identifier for entry in official}
    statements = [{e.statement for e in read_examples(tmp_path / "data" / split / "nlvr2.jsonl")} for split in SPLITS]
    assert sum(map(len, statements)) == len(set.union(*statements)) == 2018
    assert len(files_by_id(tmp_path / "data")) == 2 * 4051
