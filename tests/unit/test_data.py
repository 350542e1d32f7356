"""Readers of the official files, and the preparation of splits."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from routevl.data import prepare
from routevl.data.coco import read_captions, read_image_list, read_karpathy_splits
from routevl.data.image_files import ImageFolder, image_endings
from routevl.data.vqav2 import ANNOTATIONS, QUESTIONS, read_pair, usual_answer
from routevl.errors import RoutevlError
from routevl.files import read_json
from routevl.metrics.vqa import normalize_answer

REFERENCE = Path(os.environ.get("ROUTEVL_REFERENCE", "."))
needs_reference = pytest.mark.skipif(
    "ROUTEVL_REFERENCE" not in os.environ, reason="ROUTEVL_REFERENCE names no folder of reference data"
)


def captions_file(image_ids: list[int], first_id: int = 1) -> dict:
    return {
        "info": {},
        "licenses": [{"id": 1, "name": "test"}],
        "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "width": 4} for n in image_ids],
        "annotations": [{"id": first_id + place, "image_id": n, "caption": f"picture {n}."} for place, n in enumerate(image_ids)],
    }


def questions_file(image_ids: list[int]) -> dict:
    return {
        "questions": [{"image_id": n, "question_id": n * 1000, "question": "is it?"} for n in image_ids],
        "data_type": "mscoco",
    }


def annotations_file(image_ids: list[int], answer: str = "yes") -> dict:
    return {
        "annotations": [
            {
                "image_id": n,
                "question_id": n * 1000,
                "question_type": "is it",
                "answer_type": "yes/no",
                "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1 + k} for k in range(10)],
            }
            for n in image_ids
        ]
    }


def karpathy_file(splits: dict[int, str]) -> dict:
    return {
        "images": [
            {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "imgid": place, "split": split, "cocoid": n}
            for place, (n, split) in enumerate(splits.items())
        ],
        "dataset": "coco",
    }


def save(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


# Readers


def test_readers_take_plain_and_compressed_files(tmp_path):
    content = captions_file([3, 1])
    plain = save(tmp_path / "captions.json", content)
    compressed = tmp_path / "captions.json.gz"
    compressed.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert read_captions(plain) == read_captions(compressed) == content
    assert QUESTIONS.read(save(tmp_path / "q.json", questions_file([3]))) == questions_file([3])
    assert ANNOTATIONS.read(save(tmp_path / "a.json", annotations_file([3]))) == annotations_file([3])


def test_a_prepared_split_without_items_is_readable(tmp_path):
    assert QUESTIONS.read(save(tmp_path / "q.json", {"questions": []})) == {"questions": []}
    assert read_captions(save(tmp_path / "c.json", {"images": [], "annotations": []}))["images"] == []


def spoiled(content: dict, *place, value=None, remove: bool = False) -> dict:
    content = json.loads(json.dumps(content))
    target = content
    for key in place[:-1]:
        target = target[key]
    if remove:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return content


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_captions, [], "not a COCO captions file: data must be object"),
        (read_captions, {"images": []}, "must contain .'annotations'. properties"),
        (read_captions, {"annotations": {}}, "data.annotations must be array"),
        (read_captions, {"annotations": [7]}, r"annotations\[0\] must be object"),
        (
            read_captions,
            spoiled(captions_file([1, 2]), "annotations", 1, "caption", remove=True),
            r"annotations\[1\] must contain .'caption'. properties",
        ),
        (
            read_captions,
            spoiled(captions_file([1, 2]), "annotations", 1, "image_id", value="2"),
            r"annotations\[1\]\.image_id must be integer",
        ),
        (read_captions, spoiled(captions_file([1, 2]), "annotations", 1, "id", value=True), r"\.id must be integer"),
        (read_captions, spoiled(captions_file([1, 2]), "annotations", 1, "caption", value=None), r"\.caption must be string"),
        (read_captions, spoiled(captions_file([1, 2]), "annotations", 1, "id", value=1), "the id 1 is there twice"),
        (read_captions, spoiled(captions_file([1, 2]), "images", 1, "id", value=1), "the id 1 is there twice"),
        (
            read_captions,
            spoiled(captions_file([1, 2]), "images", 1, "id", value=5),
            "the image_id 2 of a caption is not in 'images'",
        ),
        (read_captions, spoiled(captions_file([1]), "licenses", value={}), "licenses must be array"),
        (QUESTIONS.read, annotations_file([1]), "must contain .'questions'. properties"),
        (ANNOTATIONS.read, questions_file([1]), "must contain .'annotations'. properties"),
        (
            ANNOTATIONS.read,
            spoiled(annotations_file([1]), "annotations", 0, "answers", value=[]),
            r"annotations\[0\]\.answers must contain at least 1 items",
        ),
        (
            ANNOTATIONS.read,
            spoiled(annotations_file([1]), "annotations", 0, "answers", 3, "answer", value=2),
            r"annotations\[0\]\.answers\[3\]\.answer must be string",
        ),
        (
            ANNOTATIONS.read,
            spoiled(annotations_file([1]), "annotations", 0, "answer_type", value=3),
            r"annotations\[0\]\.answer_type must be string",
        ),
        (
            ANNOTATIONS.read,
            spoiled(annotations_file([1]), "annotations", 0, "answers", remove=True),
            r"annotations\[0\] must contain .'answers'. properties",
        ),
        (read_image_list, [{"id": 1}], r"data\[0\] must contain .'file_name'. properties"),
        (read_image_list, {"annotations": []}, r"data must contain .'images'. properties"),
        (read_image_list, {"images": captions_file([1])["images"] * 2}, "the id 1 is there twice"),
        (read_image_list, "x.jpg", "not a list of images, .* data must be object or array"),
        (read_karpathy_splits, captions_file([1]), r"images\[0\] must contain .'cocoid', 'split'. properties"),
        (
            read_karpathy_splits,
            spoiled(karpathy_file({1: "train", 2: "val"}), "images", 1, "cocoid", value=1),
            "the cocoid 1 is there twice",
        ),
        (read_karpathy_splits, karpathy_file({1: "train", 2: "dev"}), r"images\[1\]\.split must be one of .*'restval'"),
    ],
)
def test_wrong_files_are_one_clear_error(tmp_path, reader, content, message):
    path = save(tmp_path / "file.json", content)
    with pytest.raises(RoutevlError, match=message) as error:
        reader(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


DEEP = b"[" * 100_000 + b"]" * 100_000
TORN_ZIP = bytearray(gzip.compress(json.dumps(questions_file(list(range(1000)))).encode()))
TORN_ZIP[60:70] = bytes(10)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"questions": [', b"\x1f\x8b\x08broken", b"\xff\xfe", bytes(TORN_ZIP), DEEP, b"1" * 5000],
)
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(RoutevlError, match="not a readable JSON file"):
        QUESTIONS.read(path)


def test_pairs_are_matched_by_question_id(tmp_path):
    questions = save(tmp_path / "q.json", questions_file([1, 2, 3]))
    annotations = save(tmp_path / "a.json", annotations_file([3, 1, 2]))
    matched = read_pair(questions, annotations)
    assert [[record["question_id"] for record in records] for records in matched] == [[1000, 2000, 3000]] * 2


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (annotations_file([1, 2, 2]), "the question_id 2000 is there twice"),
        (annotations_file([1]), "no annotation for the question_id 2000"),
        (annotations_file([1, 2, 4]), "the question_id 4000 is not in"),
        (
            spoiled(annotations_file([1, 2]), "annotations", 0, "image_id", value=9),
            "question_id 1000 is about the image 9, but about 1 in",
        ),
    ],
)
def test_pairs_that_do_not_match(tmp_path, annotations, message):
    questions = save(tmp_path / "q.json", questions_file([1, 2]))
    with pytest.raises(RoutevlError, match=message):
        read_pair(questions, save(tmp_path / "a.json", annotations))


def test_images_are_found_by_the_number_in_their_names(tmp_path):
    for name in (
        "000000000007.jpg",
        "COCO_train2014_000000000008.JPG",
        "a_b_000000000009.png",
        "7.jpg",
        "x.txt",
    ):
        (tmp_path / name).touch()
    assert set(ImageFolder(tmp_path).numbered) == {7, 8, 9}
    (tmp_path / "COCO_val2014_000000000007.jpg").touch()
    folder = ImageFolder(tmp_path)
    assert folder.find(8) == tmp_path / "COCO_train2014_000000000008.JPG"
    with pytest.raises(RoutevlError, match=r"000000000007\.jpg have the same image id 7"):
        folder.find(7)
    assert folder.find(7, "000000000007.jpg") == tmp_path / "000000000007.jpg"
    with pytest.raises(RoutevlError, match="expected a folder of images"):
        ImageFolder(tmp_path / "nowhere")


def test_the_endings_of_images_are_those_that_pillow_reads():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jfif"} <= image_endings()
    assert not {".txt", ".json", ".pdf", ""} & image_endings()  # Pillow writes PDF, but does not read it


@pytest.mark.parametrize("ending", ["webp", "TIFF", "bmp", "gif", "jfif", "ppm"])
def test_images_of_every_ending_that_pillow_reads_are_found(tmp_path, ending):
    file = tmp_path / f"COCO_val2014_000000000012.{ending}"
    file.touch()
    assert ImageFolder(tmp_path).find(12) == file


H22_NAMES = [
    "COCO_val2014_000000000012.jpg",
    "000000000012.jpg",
    "000000000012.png",
    "val2014/COCO_val2014_000000000012.jpg",
    "val2017/000000000012.jpg",
    "C:\\photographs\\val2014\\COCO_val2014_000000000012.jpg",
    "http://images.example.org/val2014/COCO_val2014_000000000012.jpg?size=full",
    "photograph.jpg",
    "",
    None,
]


@pytest.mark.parametrize("name", H22_NAMES)
def test_h22_an_image_is_found_however_it_is_named_elsewhere(tmp_path, name):
    file = tmp_path / "COCO_val2014_000000000012.jpg"
    for path in (file, tmp_path / "COCO_val2014_000000000013.jpg"):
        path.touch()
    assert ImageFolder(tmp_path).find(12, name) == file


def test_h22_the_name_goes_before_its_last_part_before_the_id(tmp_path):
    names = ["val2014/a.jpg", "a.jpg", "000000000012.jpg"]
    (tmp_path / "val2014").mkdir()
    for name in names:
        (tmp_path / name).touch()
    for name in names:
        assert ImageFolder(tmp_path).find(12, "val2014/a.jpg") == tmp_path / name
        (tmp_path / name).unlink()
    assert ImageFolder(tmp_path).find(12, "val2014/a.jpg") is None


def test_h22_a_name_with_the_id_of_another_image_is_not_found_by_the_id(tmp_path):
    """An image 5 that is `000000000139.jpg` somewhere is not the folder's `000000000005.jpg`."""
    (tmp_path / "000000000005.jpg").touch()
    assert ImageFolder(tmp_path).find(5, "000000000139.jpg") is None
    assert ImageFolder(tmp_path).looked_for(5, "000000000139.jpg") == f"{tmp_path}: 000000000139.jpg"


def test_h22_two_files_with_the_id_that_is_looked_for(tmp_path):
    for name in ("000000000005.jpg", "000000000005.webp", "000000000006.jpg"):
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    with pytest.raises(RoutevlError, match=r"000000000005\.jpg and 000000000005\.webp have the same image id 5"):
        folder.find(5, "val2014/COCO_val2014_000000000005.jpg")
    assert folder.find(5, "000000000005.webp") == tmp_path / "000000000005.webp"  # no doubt here
    assert folder.find(6) == tmp_path / "000000000006.jpg"


# Preparation


@pytest.fixture
def make_source(tmp_path):
    """Makes a source of ten images (or those given) on disk; returns its entry of --sources."""

    def make(name: str = "source", image_ids=tuple(range(1, 11)), captioned=True, asked=True, **changed) -> dict:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for image_id in image_ids:
            (folder / "images" / f"COCO_val2014_{image_id:012d}.jpg").touch()
        entry = {
            "images": str(folder / "images"),
            "split": {"train": 0.6, "val": 0.2, "test": 0.2, "seed": 1},
        }
        ids = list(image_ids)
        if captioned:
            captions = captions_file(ids, first_id=1000 * ids[0])
            entry["captions"] = str(save(folder / "captions.json", captions))
        if asked:
            entry["questions"] = str(save(folder / "questions.json", questions_file(ids)))
            entry["annotations"] = str(save(folder / "annotations.json", annotations_file(ids)))
        entry |= changed
        return {key: value for key, value in entry.items() if value is not None}

    return make


def prepare_run(output: Path, sources, *options: str) -> None:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    text = sources if isinstance(sources, str) else json.dumps(sources)
    options = options or ("--minimum-answer-count", "1")
    prepare.run(parser.parse_args(["--sources", text, "--output", str(output), *options]))


def image_ids_of(folder: Path) -> list[int]:
    return [image["id"] for image in read_json(folder / "images.json")]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.json")}


def test_fractions_are_exact_disjoint_and_reproducible(tmp_path, make_source):
    source = make_source()
    prepare_run(tmp_path / "data", [source])
    ids = {split: image_ids_of(tmp_path / "data" / split) for split in ("train", "val", "test")}
    assert {split: len(numbers) for split, numbers in ids.items()} == {"train": 6, "val": 2, "test": 2}
    assert sorted(sum(ids.values(), [])) == list(range(1, 11))
    prepare_run(tmp_path / "again", [source])
    assert everything(tmp_path / "again") == everything(tmp_path / "data")
    prepare_run(tmp_path / "other", [source | {"split": source["split"] | {"seed": 2}}])
    assert image_ids_of(tmp_path / "other" / "test") != ids["test"]


def test_prepared_files_are_official_and_agree(tmp_path, make_source):
    prepare_run(tmp_path / "data", [make_source()])
    for split in ("train", "val", "test"):
        folder = tmp_path / "data" / split
        images = read_json(folder / "images.json")
        assert images == sorted(images, key=lambda image: image["id"])
        assert all(Path(image["file_name"]).is_file() for image in images)
        ids = [image["id"] for image in images]
        questions, annotations = read_pair(folder / "questions.json", folder / "annotations.json")
        captions = read_captions(folder / "captions.json")
        assert sorted(question["image_id"] for question in questions) == ids
        assert len(annotations[0]["answers"]) == 10
        assert [image["id"] for image in captions["images"]] == ids
        assert captions["images"][0]["width"] == 4 and captions["licenses"] == [{"id": 1, "name": "test"}]
        header = {"info", "task_type", "data_type", "data_subtype", "license"}
        assert header | {"questions"} == set(QUESTIONS.read(folder / "questions.json"))


def test_b11_the_images_bytes_are_prepared(tmp_path, make_source):
    source = make_source()
    for number, path in enumerate(sorted(Path(source["images"]).iterdir())):
        path.write_bytes(b"x" * number)
    prepare_run(tmp_path / "data", [source])
    images = [image for split in ("train", "val", "test") for image in read_json(tmp_path / "data" / split / "images.json")]
    assert len(images) == 10
    for image in images:
        assert list(image) == ["id", "file_name", "sha256"]
        assert image["sha256"] == hashlib.sha256(Path(image["file_name"]).read_bytes()).hexdigest()
    captions = read_captions(tmp_path / "data" / "train" / "captions.json")
    assert not any("sha256" in image for image in captions["images"])


def test_b11_each_image_is_hashed_once(tmp_path, make_source, monkeypatch):
    hashed = []
    monkeypatch.setattr(prepare, "sha256_of", lambda path: hashed.append(path) or "0" * 64)
    sources = [make_source(asked=False), make_source(captioned=False)]
    prepare_run(tmp_path / "data", sources)
    assert len(hashed) == len(set(hashed)) == 10


def test_h10_prepared_texts_are_whole_characters(tmp_path, make_source):
    source, half = make_source(), "what \ud83d"
    questions, annotations, captions = (json.loads(Path(source[k]).read_text()) for k in ("questions", "annotations", "captions"))
    for question, annotation, caption in zip(
        questions["questions"], annotations["annotations"], captions["annotations"], strict=True
    ):
        question["question"] = caption["caption"] = annotation["question_type"] = annotation["multiple_choice_answer"] = half
        annotation["answers"][0]["answer"] = half
    for kind, content in (("questions", questions), ("annotations", annotations), ("captions", captions)):
        save(Path(source[kind]), content)
    prepare_run(tmp_path / "data", [source])
    folder = tmp_path / "data" / "train"
    prepared = read_pair(folder / "questions.json", folder / "annotations.json")
    assert prepared[0][0]["question"] == prepared[1][0]["multiple_choice_answer"] == "what \ufffd"
    assert read_captions(folder / "captions.json")["annotations"][0]["caption"] == "what \ufffd"
    assert read_json(tmp_path / "data" / "answers.json") == ["what \ufffd"]


@pytest.mark.parametrize("name", ["a\0b.jpg", "x" * 5000 + ".jpg", "caf\ud83d.jpg"])
def test_h10_a_name_that_no_file_can_have(tmp_path, make_source, name):
    source = make_source()
    (Path(source["images"]) / "COCO_val2014_000000000005.jpg").unlink()
    content = captions_file(list(range(1, 11)))
    content["images"][4]["file_name"] = name
    save(Path(source["captions"]), content)
    with pytest.raises(RoutevlError, match=r"no such image, but .*captions\.json refers to the image 5; 1 of 10 images"):
        prepare_run(tmp_path / "data", [source])


def test_h10_a_file_name_that_is_no_text(tmp_path, make_source):
    source = make_source()
    images = Path(source["images"])
    name = os.fsencode(images / "COCO_val2014_000000000003.jpg")
    os.rename(name, name.replace(b"val2014_", b"caf\xe9_"))
    del source["captions"]
    with pytest.raises(RoutevlError, match=r"images/COCO_caf\\udce9_000000000003.jpg': a path that is not UTF-8"):
        prepare_run(tmp_path / "data", [source])
    assert not (tmp_path / "data").exists()


def test_sources_merge_into_named_splits(tmp_path, make_source):
    sources = [
        make_source("first", (1, 2), split="train"),
        make_source("second", (3,), split="val", captioned=False),
        make_source("third", (3,), split="val", asked=False),
        make_source("fourth", (5,), split="test"),
    ]
    with pytest.raises(RoutevlError, match="the image id 3 is .*second.* in one source, but .*third"):
        prepare_run(tmp_path / "data", sources)
    assert not (tmp_path / "data").exists()
    sources[2]["images"] = sources[1]["images"]
    prepare_run(tmp_path / "data", sources)
    assert image_ids_of(tmp_path / "data" / "train") == [1, 2]
    assert image_ids_of(tmp_path / "data" / "val") == [3]
    assert len(read_captions(tmp_path / "data" / "val" / "captions.json")["annotations"]) == 1


@pytest.fixture
def karpathy_sources(tmp_path, make_source):
    """Two sources, as train2014 and val2014 are, which the file of splits mixes; it names an image, 99, that is in neither."""
    splits = {1: "train", 2: "train", 11: "restval", 12: "val", 13: "test", 14: "val", 15: "restval", 99: "train"}
    split = {"karpathy": str(save(tmp_path / "dataset_coco.json", karpathy_file(splits)))}
    return [
        make_source("train2014", (1, 2), split=split),
        make_source("val2014", (11, 12, 13, 14, 15), split=split),
    ]


def test_karpathy_splits_go_by_image_id(tmp_path, karpathy_sources):
    prepare_run(tmp_path / "data", karpathy_sources)
    ids = {split: image_ids_of(tmp_path / "data" / split) for split in ("train", "val", "test")}
    assert ids == {"train": [1, 2, 11, 15], "val": [12, 14], "test": [13]}
    restval = read_json(tmp_path / "data" / "train" / "images.json")[2]
    assert restval["file_name"] == str(tmp_path / "val2014" / "images" / "COCO_val2014_000000000011.jpg")
    questions = QUESTIONS.read(tmp_path / "data" / "train" / "questions.json")["questions"]
    captions = read_captions(tmp_path / "data" / "train" / "captions.json")["annotations"]
    assert {record["image_id"] for record in questions} == {record["image_id"] for record in captions} == {1, 2, 11, 15}


def test_images_that_karpathy_does_not_name_are_an_error_or_dropped(tmp_path, karpathy_sources, make_source, capsys):
    karpathy_sources[1] = make_source("val2014", (11, 12, 13, 16, 17), split=karpathy_sources[1]["split"])
    with pytest.raises(RoutevlError, match=r"dataset_coco\.json: does not name the image 16, which is in .*val2014") as error:
        prepare_run(tmp_path / "data", karpathy_sources)
    assert "missing_images" in str(error.value)
    karpathy_sources[1]["missing_images"] = "drop"
    prepare_run(tmp_path / "data", karpathy_sources)
    assert "dropped what is about 2 of 5 images" in capsys.readouterr().out
    assert [image_ids_of(tmp_path / "data" / split) for split in ("train", "val", "test")] == [[1, 2, 11], [12], [13]]


def test_captions_alone(tmp_path, make_source):
    prepare_run(tmp_path / "data", [make_source(asked=False)])
    assert QUESTIONS.read(tmp_path / "data" / "train" / "questions.json")["questions"] == []
    assert ANNOTATIONS.read(tmp_path / "data" / "train" / "annotations.json")["annotations"] == []
    assert read_json(tmp_path / "data" / "answers.json") == []


def test_missing_images_are_an_error_or_dropped(tmp_path, make_source, capsys):
    source = make_source(image_ids=tuple(range(1, 13)))
    for image_id in (3, 4):
        (Path(source["images"]) / f"COCO_val2014_{image_id:012d}.jpg").unlink()
    with pytest.raises(RoutevlError) as error:
        prepare_run(tmp_path / "data", [source])
    for part in ("COCO_val2014_000000000003.jpg", "the image 3", "captions.json", "missing_images"):
        assert part in str(error.value)
    prepare_run(tmp_path / "data", [source | {"missing_images": "drop"}])
    assert "dropped what is about 2 of 12 images" in capsys.readouterr().out
    found = sum((image_ids_of(tmp_path / "data" / split) for split in ("train", "val", "test")), [])
    assert len(found) == 10 and not {3, 4} & set(found)


def test_missing_images_of_questions_name_the_questions_file(tmp_path, make_source):
    source = make_source(captioned=False)
    (Path(source["images"]) / "COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(RoutevlError, match=r"000000000003.*no such image.*questions\.json refers to the image 3"):
        prepare_run(tmp_path / "data", [source])


def renamed(source: dict, name) -> dict:
    """A source whose captions file names image n by `name(n)`."""
    content = json.loads(Path(source["captions"]).read_text())
    for image in content["images"]:
        image["file_name"] = name(image["id"])
    save(Path(source["captions"]), content)
    return source


def test_h22_names_of_another_layout_make_the_same_data(tmp_path, make_source):
    source = make_source()
    prepare_run(tmp_path / "data", [source])
    renamed(source, lambda n: f"https://example.org/val2017/{n:012d}.jpg")
    prepare_run(tmp_path / "renamed", [source])
    for split in ("train", "val", "test"):
        assert (tmp_path / "renamed" / split / "images.json").read_bytes() == (
            tmp_path / "data" / split / "images.json"
        ).read_bytes()


def test_h22_the_error_says_what_was_looked_for(tmp_path, make_source):
    source = renamed(make_source(), lambda n: f"val2014/COCO_val2014_{n:012d}.jpg")
    (Path(source["images"]) / "COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(RoutevlError) as error:
        prepare_run(tmp_path / "data", [source])
    tried = "val2014/COCO_val2014_000000000003.jpg or COCO_val2014_000000000003.jpg or [..._]000000000003.jpg (or another ending"
    assert f"{source['images']}: {tried}" in str(error.value) and "1 of 10 images are missing" in str(error.value)


def test_h22_two_images_are_not_made_one_by_the_last_part_of_their_names(tmp_path, make_source):
    source = renamed(make_source(), lambda n: f"{n % 5}/photo.jpg" if n in (3, 4) else f"COCO_val2014_{n:012d}.jpg")
    (Path(source["images"]) / "photo.jpg").touch()
    with pytest.raises(RoutevlError, match=r"photo\.jpg: found for the image 3 .3/photo.jpg. and for the image 4 .*image_list"):
        prepare_run(tmp_path / "data", [source])


@pytest.mark.parametrize("as_coco", [True, False])
def test_an_image_list_names_the_images_of_a_source(tmp_path, make_source, as_coco):
    """Of questions alone, which name no files; the names need no ids in them."""
    source = make_source(captioned=False)
    folder = Path(source["images"])
    entries = []
    for n in range(1, 11):
        (folder / f"COCO_val2014_{n:012d}.jpg").rename(folder / f"photo {n}.JPG")
        entries.append({"id": n, "file_name": f"photo {n}.JPG", "height": 3})
    with pytest.raises(RoutevlError, match=r"\[..._\]000000000001.jpg .*: no such image"):
        prepare_run(tmp_path / "data", [source])
    source["image_list"] = str(save(tmp_path / "images.json", {"images": entries} if as_coco else entries))
    prepare_run(tmp_path / "data", [source])
    images = [image for split in ("train", "val", "test") for image in read_json(tmp_path / "data" / split / "images.json")]
    assert {image["id"]: Path(image["file_name"]).name for image in images} == {n: f"photo {n}.JPG" for n in range(1, 11)}


def test_an_image_list_wins_over_the_captions_file(tmp_path, make_source):
    source = make_source()
    (Path(source["images"]) / "other.jpg").touch()
    source["image_list"] = str(save(tmp_path / "images.json", [{"id": 3, "file_name": "other.jpg"}]))
    source["split"] = {"train": 0.6, "val": 0.2, "test": 0.2, "seed": 1}
    prepare_run(tmp_path / "data", [source])
    for split in ("train", "val", "test"):
        names = {image["id"]: Path(image["file_name"]).name for image in read_json(tmp_path / "data" / split / "images.json")}
        for image in read_captions(tmp_path / "data" / split / "captions.json")["images"]:
            assert (
                names[image["id"]]
                == image["file_name"]
                == ("other.jpg" if image["id"] == 3 else f"COCO_val2014_{image['id']:012d}.jpg")
            )
            assert image["width"] == 4  # what else the captions file says of it is kept


def test_the_first_images_of_a_large_set(tmp_path, make_source, capsys):
    """What is about them is kept, and the others need not be there."""
    source = make_source(max_images=5, split={"train": 0.6, "val": 0.2, "test": 0.2, "seed": 1})
    for n in range(6, 11):
        (Path(source["images"]) / f"COCO_val2014_{n:012d}.jpg").unlink()
    prepare_run(tmp_path / "data", [source])
    assert "kept what is about the first 5 of 10 images" in capsys.readouterr().out
    folders = [tmp_path / "data" / split for split in ("train", "val", "test")]
    assert sorted(sum(map(image_ids_of, folders), [])) == [1, 2, 3, 4, 5]
    assert sum(len(QUESTIONS.read(folder / "questions.json")["questions"]) for folder in folders) == 5
    (Path(source["images"]) / "COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(RoutevlError, match="the image 3; "):
        prepare_run(tmp_path / "data", [source])


def test_the_first_images_that_are_there_where_missing_ones_are_dropped(tmp_path, make_source):
    source = make_source(max_images=5, missing_images="drop")
    for n in (1, 3):
        (Path(source["images"]) / f"COCO_val2014_{n:012d}.jpg").unlink()
    prepare_run(tmp_path / "data", [source])
    ids = [image_ids_of(tmp_path / "data" / split) for split in ("train", "val", "test")]
    assert sorted(sum(ids, [])) == [2, 4, 5, 6, 7]
    prepare_run(tmp_path / "all", [source | {"max_images": 100}])
    assert sum(len(image_ids_of(tmp_path / "all" / split)) for split in ("train", "val", "test")) == 8


def test_an_offset_keeps_the_ids_of_two_sources_apart(tmp_path, make_source, karpathy_sources):
    """Files, and Karpathy's splits, go by the ids as they were."""
    other = make_source("other", (1, 2, 11), split=karpathy_sources[0]["split"], asked=False)
    with pytest.raises(
        RoutevlError, match=r"the image id 1 is .*train2014.* in one source, but .*other.* in another; .*id_offset"
    ):
        prepare_run(tmp_path / "data", [*karpathy_sources, other])
    prepare_run(tmp_path / "data", [*karpathy_sources, other | {"id_offset": 10**6}])
    folder = tmp_path / "data" / "train"
    assert image_ids_of(folder) == [1, 2, 11, 15, 1000001, 1000002, 1000011]
    captions = read_captions(folder / "captions.json")
    assert [(c["id"], c["image_id"], c["caption"]) for c in captions["annotations"][-2:]] == [
        (1001001, 1000002, "picture 2."), (1001002, 1000011, "picture 11."),
    ]  # fmt: skip
    assert captions["images"][-1]["id"] == 1000011 and captions["images"][-1]["file_name"] == "COCO_val2014_000000000011.jpg"


def test_an_offset_is_added_to_questions_and_their_annotations(tmp_path, make_source):
    sources = [
        make_source(split, (n, n + 1), split=split, captioned=False) for n, split in ((1, "train"), (3, "val"), (5, "test"))
    ]
    for source in sources[:2]:  # both count their questions from 1 on
        for kind in ("questions", "annotations"):
            content = json.loads(Path(source[kind]).read_text())
            for number, record in enumerate(content[kind], start=1):
                record["question_id"] = number
            save(Path(source[kind]), content)
    with pytest.raises(RoutevlError) as error:
        prepare_run(tmp_path / "data", sources)
    places = f"in {sources[0]['questions']} and in {sources[1]['questions']}"
    assert f"the question_id 1 is there twice, {places}; give one of the two sources an id_offset" in str(error.value)
    sources[1]["id_offset"] = 100
    prepare_run(tmp_path / "data", sources)
    folder = tmp_path / "data" / "val"
    for records in read_pair(folder / "questions.json", folder / "annotations.json"):
        assert [(record["question_id"], record["image_id"]) for record in records] == [(101, 103), (102, 104)]
    sources[1]["id_offset"] = 2**63 - 3
    with pytest.raises(
        RoutevlError, match="id_offset 9223372036854775805 is too large: 9223372036854775808 is more than 64 bits"
    ):
        prepare_run(tmp_path / "data", sources)


def test_validation_is_cut_from_train_where_test_is_official(tmp_path, make_source):
    """Shares that are left out are zero, as are those that are given so."""
    test = make_source("test", tuple(range(101, 105)), split="test")
    for name, split in (
        ("left out", {"train": 0.8, "val": 0.2, "seed": 1}),
        ("zero", {"train": 0.8, "val": 0.2, "test": 0, "seed": 1}),
    ):
        prepare_run(tmp_path / name, [make_source(split=split), test])
        ids = {split: image_ids_of(tmp_path / name / split) for split in ("train", "val", "test")}
        assert (len(ids["train"]), len(ids["val"]), ids["test"]) == (8, 2, [101, 102, 103, 104])
    assert everything(tmp_path / "left out") == everything(tmp_path / "zero")


def test_an_image_in_two_splits(tmp_path, make_source):
    source = make_source()
    test = {key: source[key] for key in ("images", "captions")} | {"split": "test"}
    with pytest.raises(RoutevlError, match="is both in train and in test"):
        prepare_run(tmp_path / "data", [source, test])


def test_one_file_under_two_ids_in_two_splits(tmp_path, make_source):
    source = make_source("a", split="train")
    other = make_source("b", (11, 12), split="test")
    captions = captions_file([11, 12], first_id=5000)
    captions["images"][0]["file_name"] = str(Path(source["images"]).resolve() / "COCO_val2014_000000000001.jpg")
    save(Path(other["captions"]), captions)
    with pytest.raises(RoutevlError, match="is both in train and in test"):
        prepare_run(tmp_path / "data", [source, other])


def test_repeated_source_repeats_question_ids(tmp_path, make_source):
    with pytest.raises(RoutevlError, match="--sources: the question_id 1000 is there twice"):
        prepare_run(tmp_path / "data", [make_source(), make_source()])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", "the split 'val' has no images"),
        ({"train": 0.5, "test": 0.5, "seed": 1}, "the split 'val' has no images"),
    ],
)
def test_empty_splits(tmp_path, make_source, split, message):
    with pytest.raises(RoutevlError, match=message):
        prepare_run(tmp_path / "data", [make_source(split=split)])


def test_a_split_that_lacks_the_questions_of_the_others(tmp_path, make_source):
    sources = [
        make_source("a", (1,), split="train"),
        make_source("b", (2,), split="val", asked=False),
        make_source("c", (3,), split="test"),
    ]
    with pytest.raises(RoutevlError, match="the split 'val' has no questions"):
        prepare_run(tmp_path / "data", sources)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "x"}, r"--sources: not a list of sources .*unexpected keyword argument 'image'"),
        ({"images": None}, "missing 1 required positional argument: 'images'"),
        ({"split": "validation"}, "split validation: expected a split, fractions"),
        ({"split": ["train"]}, "not a list of sources"),
        ({"split": {"train": 1, "dev": 0}}, "and a seed"),
        ({"split": {"train": 0.6, "val": 0.2, "test": 0.3, "seed": 1}}, "fractions that sum to 1"),
        ({"split": {"train": float("nan"), "val": 1, "seed": 1}}, "fractions that sum to 1"),
        ({"split": {"karpathy": "nowhere.json"}}, "nowhere.json: no such file"),
        ({"split": {"karpathy": 3}}, r"data\[0\].split.karpathy must be string"),
        ({"split": {"train": 0.6, "val": 0.2, "test": 0.2, "seed": 1.5}}, "split.seed must be integer"),
        ({"split": {"train": 0.6, "val": 0.2, "test": 0.2, "seed": -1}}, "split.seed must be bigger than or equal to 0"),
        ({"split": {"train": 1.6, "val": -0.8, "test": 0.2, "seed": 1}}, "split.val must be bigger than or equal to 0"),
        ({"split": {"train": "1", "seed": 1}}, "split.train must be number"),
        ({"images": 3}, r"data\[0\].images must be string"),
        ({"images": "a\0b"}, "expected a folder of images .embedded null byte"),
        ({"captions": "a\0b"}, "not a readable JSON file .embedded null byte"),
        ({"split": {"seed": 1}}, "fractions that sum to 1"),
        ({"max_images": 0}, "max_images must be bigger than or equal to 1"),
        ({"id_offset": -1}, "id_offset must be bigger than or equal to 0"),
        ({"id_offset": "5"}, "id_offset must be integer"),
        ({"image_list": "nowhere.json"}, "nowhere.json: no such file"),
        ({"missing_images": "Drop"}, "missing_images must be one of .'error', 'drop'"),
        ({"annotations": None}, "needs captions, or questions and annotations"),
        ({"annotations": None, "questions": None, "captions": None}, "needs captions, or questions and annotations"),
    ],
)
def test_wrong_sources(tmp_path, make_source, changed, message):
    with pytest.raises(RoutevlError, match=message):
        prepare_run(tmp_path / "data", [make_source(**changed)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "--sources: not a list of sources"),
        ("[]", "the split 'train' has no images"),
        ('{"images": "x"}', "--sources: not a list of sources"),
        ("[3]", "--sources: not a list of sources"),
        ("nowhere.json", "--sources: not a list of sources"),
        ("[" * 100_000, "--sources: not a list of sources.*recursion"),
    ],
)
def test_wrong_lists_of_sources(tmp_path, text, message):
    with pytest.raises(RoutevlError, match=message):
        prepare_run(tmp_path / "data", text)


# Answers


def annotated(answers: list[str]) -> prepare.Split:
    return prepare.Split(annotations=[{"multiple_choice_answer": answer} for answer in answers])


def test_vocabulary_is_normalised_counted_and_ordered():
    splits = {
        "train": annotated(["Yes", "yes.", "two", "a dog"] + ["red"] * 2),
        "val": annotated(["2", "2", "dog", "yes"]),
        "test": annotated(["never"] * 9),
    }
    assert prepare.build_vocabulary(splits, ("train", "val"), 2) == ["2", "yes", "dog", "red"]
    assert prepare.build_vocabulary(splits, ("train", "val"), 3) == ["2", "yes"]
    assert prepare.build_vocabulary(splits, ("test", "train", "val"), 3) == ["never", "2", "yes"]
    assert prepare.build_vocabulary(splits, ("val",), 1) == ["2", "dog", "yes"]
    with pytest.raises(RoutevlError, match="no answer occurs 4 times in train, val; lower --minimum-answer-count"):
        prepare.build_vocabulary(splits, ("val", "train"), 4)


def test_answers_of_the_chosen_splits_are_counted(tmp_path, make_source):
    sources = [make_source(split, (n,), split=split) for n, split in enumerate(("train", "val", "test"), start=1)]
    save(Path(sources[2]["annotations"]), annotations_file([3], answer="no"))
    count = ("--minimum-answer-count", "1")
    for options, answers in (((), ["yes"]), (("--answer-splits", "train", "test"), ["no", "yes"])):
        prepare_run(tmp_path / "data", sources, *count, *options)
        assert read_json(tmp_path / "data" / "answers.json") == answers


def test_a_given_vocabulary_counts_no_splits(tmp_path, make_source):
    vocabulary = save(tmp_path / "vocabulary.json", ["yes"])
    with pytest.raises(RoutevlError, match="--answer-splits: of no use with --vocabulary"):
        prepare_run(tmp_path / "data", [make_source()], "--vocabulary", str(vocabulary), "--answer-splits", "train")


def test_vocabulary_files(tmp_path, make_source):
    vocabulary = save(tmp_path / "vocabulary.json", {"b": 0, "": 2, "a": 1})
    prepare_run(tmp_path / "data", [make_source()], "--vocabulary", str(vocabulary))
    assert read_json(tmp_path / "data" / "answers.json") == ["b", "a", ""]
    assert prepare.read_vocabulary(save(tmp_path / "list.json", ["x", "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 0, "b": 2}, "each index from 0 to 1 once"),
        ({"a": 0, "b": "1"}, "b must be integer"),
        ({}, "not a list of different answers, or an object of answer to index: data must contain at least 1 properties"),
        ([], "data must contain at least 1 items"),
        (["a", 1], r"data\[1\] must be string"),
        (["a", "b", "a"], "data must contain unique items"),
        ("yes", "data must be array or object"),
    ],
)
def test_wrong_vocabularies(tmp_path, content, message):
    with pytest.raises(RoutevlError, match=message):
        prepare.read_vocabulary(save(tmp_path / "vocabulary.json", content))


# VQAv2's relatives


def relatives_files(image_ids: list[int], answers: list[str]) -> dict:
    """Annotations as OK-VQA's and VizWiz's, which lack fields of VQAv2's or have other types."""
    content = annotations_file(image_ids)
    for annotation in content["annotations"]:
        del annotation["multiple_choice_answer"]
        annotation["answers"] = [{"answer": answer, "raw_answer": answer, "answer_id": n} for n, answer in enumerate(answers)]
    for annotation in content["annotations"][1:]:
        annotation["answer_type"] = "unanswerable"
        del annotation["question_type"]
    for annotation in content["annotations"][2:]:
        del annotation["answer_type"], annotation["image_id"]
    return content


def test_h09_the_usual_answer_is_that_of_most_annotators():
    def annotation(*answers: str, **fields: str) -> dict:
        return {"answers": [{"answer": answer} for answer in answers], **fields}

    assert usual_answer(annotation("ivy", "vine", "vine")) == "vine"
    assert usual_answer(annotation("ivy", "vine", "vine", "ivy")) == "ivy"
    assert usual_answer(annotation("ivy", multiple_choice_answer="vine")) == "vine"


def test_h09_the_usual_answers_of_the_demo_world_are_vqav2s_own(small_world):
    """Where the field is there it is the answer of most annotators, the first of several."""
    annotations = ANNOTATIONS.read(small_world.data / "train" / "annotations.json")["annotations"]
    for annotation in annotations:
        assert usual_answer({"answers": annotation["answers"]}) == annotation["multiple_choice_answer"]


def test_h09_the_fields_of_relatives_are_prepared_as_they_came(tmp_path, make_source):
    source = make_source(captioned=False)
    content = relatives_files(list(range(1, 11)), ["vine"] * 4 + ["ivy"] * 6)
    save(Path(source["annotations"]), content)
    prepare_run(tmp_path / "data", [source])
    by_question = {annotation["question_id"]: annotation for annotation in content["annotations"]}
    for split in ("train", "val", "test"):
        folder = tmp_path / "data" / split
        for annotation in ANNOTATIONS.read(folder / "annotations.json")["annotations"]:
            assert annotation == by_question[annotation["question_id"]]
        read_pair(folder / "questions.json", folder / "annotations.json")
    assert read_json(tmp_path / "data" / "answers.json") == ["ivy"]


# Reference data


@needs_reference
def test_reference_photographs(tmp_path):
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2, "seed": 1}
    vqa, coco = REFERENCE / "vqav2", REFERENCE / "coco"
    sources = [
        {
            "images": str(vqa / "images"),
            "questions": str(vqa / "questions_subset.json.gz"),
            "annotations": str(vqa / "annotations_subset.json.gz"),
        },
        {"images": str(coco / "val2017"), "captions": str(coco / "captions_val2017.json.gz")},
    ]
    sources = [source | {"split": fractions, "missing_images": "drop"} for source in sources]
    vocabulary = vqa / "trainval_ans2label.json"
    prepare_run(tmp_path / "data", sources, "--vocabulary", str(vocabulary))
    folders = [tmp_path / "data" / split for split in ("train", "val", "test")]
    photographs = len(list((coco / "val2017").glob("*.jpg")))
    assert sum(len(image_ids_of(folder)) for folder in folders) == 14 + photographs
    assert sum(len(QUESTIONS.read(folder / "questions.json")["questions"]) for folder in folders) == 15
    captions = [read_captions(folder / "captions.json") for folder in folders]
    assert sum(len(file["images"]) for file in captions) == photographs
    answers = read_json(tmp_path / "data" / "answers.json")
    assert len(answers) == 3129 and answers[444] == "0"


@needs_reference
def test_reference_files_are_read_whole():
    captions = read_captions(REFERENCE / "coco" / "captions_val2017.json.gz")
    assert (len(captions["images"]), len(captions["annotations"])) == (5000, 25014)
    vqa = REFERENCE / "vqav2"
    questions, annotations = read_pair(vqa / "questions_subset.json.gz", vqa / "annotations_subset.json.gz")
    assert len(questions) == len(annotations) == 8977


@needs_reference
def test_reference_answers_that_are_frequent_are_in_the_usual_vocabulary():
    """What occurs nine times in a part of VQAv2 does so in all of it, so that the usual 3,129 answers have it."""
    vqa = REFERENCE / "vqav2"
    usual = prepare.read_vocabulary(vqa / "trainval_ans2label.json")
    _, annotations = read_pair(vqa / "questions_subset.json.gz", vqa / "annotations_subset.json.gz")
    built = prepare.build_vocabulary({"train": prepare.Split(annotations=annotations)}, ("train",), 9)
    assert len(built) > 50 and set(built) <= set(usual)
    assert [normalize_answer(answer) for answer in usual] == usual
