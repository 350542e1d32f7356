"""The demo world: true and unambiguous questions, balanced answers, official formats, determinism."""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict

import numpy
import pytest

from routevl.data import shapes_language, world
from routevl.data.coco import read_captions
from routevl.data.image_files import ImageFolder
from routevl.data.scenes import (
    ATTRIBUTES,
    ATTRIBUTES_PER_CELL,
    COLORS,
    RADIUS,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    attributes,
    render,
    sample_scene,
)
from routevl.data.vqav2 import read_pair
from routevl.files import sha256_of

SCENES = 1500
QUESTIONS = 3


def asked(seed: int, scenes: int = SCENES) -> list[tuple[Scene, shapes_language.Question]]:
    generator = numpy.random.default_rng(seed)
    pairs = []
    for _ in range(scenes):
        scene = sample_scene(generator)
        pairs += [(scene, question) for question in shapes_language.questions(scene, generator, QUESTIONS)]
    return pairs


@pytest.fixture(scope="module")
def train_questions():
    return asked(seed=0)


def test_scenes_are_symmetric_and_stay_in_their_cells():
    generator = numpy.random.default_rng(0)
    scenes = [sample_scene(generator) for _ in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    for field, values in shapes_language.VALUES.items():
        counts = Counter(getattr(thing, field) for thing in things)
        assert set(counts) == set(values)
        assert max(counts.values()) < 1.2 * min(counts.values())
    for scene in scenes:
        assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
    reach = 1.08 * 1.05 * max(RADIUS.values())  # of the widest outline at its largest
    for thing in things:
        assert thing.column / 3 <= thing.x - reach and thing.x + reach <= (thing.column + 1) / 3
        assert thing.row / 3 <= thing.y - reach and thing.y + reach <= (thing.row + 1) / 3


@pytest.mark.parametrize("image_size", [24, 48, 64])
def test_render_draws_every_thing_in_its_color(image_size):
    generator = numpy.random.default_rng(3)
    for _ in range(20):
        scene = sample_scene(generator)
        image = render(scene, image_size, generator)
        assert image.mode == "RGB" and image.size == (image_size, image_size)
        for thing in scene.things:
            pixel = numpy.array(image.getpixel((int(thing.x * image_size), int(thing.y * image_size))))
            distance = {color: abs(pixel - rgb).sum() for color, rgb in RGB.items()}
            assert min(distance, key=distance.get) == thing.color


def test_attributes_tell_the_scene():
    scene = Scene((Thing("cross", "blue", "big", 1, 2, 0.83, 0.5),))
    targets = attributes(scene)
    assert targets.shape == (ATTRIBUTES,) and targets.dtype == numpy.uint8
    cells = targets.reshape(9, ATTRIBUTES_PER_CELL)
    assert cells.sum() == cells[5].sum() == 3
    names = numpy.array(SHAPES + COLORS + SIZES)
    assert names[cells[5] == 1].tolist() == ["cross", "blue", "big"]


def test_captions_are_different_and_true():
    generator = numpy.random.default_rng(1)
    for _ in range(300):
        scene = sample_scene(generator)
        written = shapes_language.captions(scene, generator)
        assert len(written) == len(set(written)) == 5
        shape_counts = Counter(thing.shape for thing in scene.things)
        colors = {thing.color for thing in scene.things}
        for caption in written:
            assert caption == caption.lower() and caption.endswith(".")
            words = re.findall(r"[a-z]+", caption)
            assert {word for word in words if word in COLORS} == colors
            mentioned = {shape for shape in SHAPES if any(word.startswith(shape) for word in words)}
            assert mentioned == set(shape_counts)
            assert " a orange" not in caption and " an red" not in caption


def test_relation_captions_hold():
    generator = numpy.random.default_rng(2)
    checked = 0
    for _ in range(500):
        scene = sample_scene(generator)
        for caption in shapes_language.captions(scene, generator):
            noun_phrase = rf"an? ((?:\w+ )+(?:{'|'.join(SHAPES)}))"
            match = re.match(rf"{noun_phrase} (?:is )?(left of|right of|above|below) {noun_phrase}[,.]", caption)
            if match:
                firsts, seconds = (matching(scene, match[place]) for place in (1, 3))
                assert any(holds(first, match[2], second) for first in firsts for second in seconds)
                checked += 1
    assert checked > 100


# An answering machine, apart from the one that asks: it reads the words and looks at the scene.


def matching(scene: Scene, phrase: str) -> list[Thing]:
    """The things of which every word of the phrase is true."""
    words = [re.sub(r"(?<=cross)es$|(?<!cros)s$", "", word) for word in phrase.removeprefix("the ").split()]
    words = [word for word in words if word != "thing"]
    known = {*SHAPES, *COLORS, *SIZES}
    assert set(words) <= known, phrase
    return [thing for thing in scene.things if set(words) <= {thing.shape, thing.color, thing.size}]


def the_only(scene: Scene, phrase: str) -> Thing:
    things = matching(scene, phrase)
    assert len(things) == 1, f"{phrase} is ambiguous in {scene}"
    return things[0]


def holds(first: Thing, relation: str, second: Thing) -> bool:
    """Whether the relation holds, by the exact centres."""
    return {
        "left of": first.x < second.x,
        "right of": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }[relation]


def apart(first: Thing, relation: str, second: Thing) -> bool:
    """Whether the two are visibly apart in the direction of the relation."""
    distance = first.x - second.x if relation in ("left of", "right of") else first.y - second.y
    return abs(distance) > 0.2


def related(scene: Scene, relation: str, phrase: str) -> Thing:
    reference = the_only(scene, phrase)
    others = [thing for thing in scene.things if thing is not reference]
    found = [o for o in others if apart(o, relation, reference) and holds(o, relation, reference)]
    assert len(found) == 1
    return found[0]


def whether(truth: bool) -> str:
    return "yes" if truth else "no"


def answer(scene: Scene, question: str) -> str:
    if match := re.fullmatch(r"what (color|shape|size) is (the .+)\?", question):
        return getattr(the_only(scene, match[2]), match[1])
    if match := re.fullmatch(r"what (?:shape )?is (left of|right of|above|below) (the .+)\?", question):
        return related(scene, match[1], match[2]).shape
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(matching(scene, match[1])))
    if match := re.fullmatch(r"is there an? (.+)\?", question):
        return whether(bool(matching(scene, match[1])))
    if match := re.fullmatch(r"(?:is|are) there (one|two|three) things?\?", question):
        return whether(len(scene.things) == ["one", "two", "three"].index(match[1]) + 1)
    if match := re.fullmatch(r"are there more (.+) than (.+)\?", question):
        return whether(len(matching(scene, match[1])) > len(matching(scene, match[2])))
    if match := re.fullmatch(r"is (the .+) (bigger|smaller) than (the .+)\?", question):
        first, second = the_only(scene, match[1]), the_only(scene, match[3])
        assert first.size != second.size
        return whether((first.size == "big") == (match[2] == "bigger"))
    match = re.fullmatch(r"is (the .+) (left of|right of|above|below) (the .+)\?", question)
    first, second = the_only(scene, match[1]), the_only(scene, match[3])
    assert apart(first, match[2], second)
    return whether(holds(first, match[2], second))


def test_every_question_has_one_answer_and_it_is_the_given_one(train_questions):
    for scene, question in train_questions:
        match = re.fullmatch(r"what color is the thing (left of|right of|above|below) (the .+)\?", question.text)
        computed = related(scene, match[1], match[2]).color if match else answer(scene, question.text)
        assert computed == question.answer, (scene, question)
        kind = {"yes": "yes/no", "no": "yes/no"}.get(computed, "number" if computed.isdigit() else "other")
        assert question.answer_type == kind
        assert question.text.startswith(question.question_type + " ")


def test_every_kind_of_question_is_asked(train_questions):
    shares = Counter(question.question_type for _, question in train_questions)
    assert set(shares) == set(shapes_language.QUESTION_TYPES)
    assert max(shares.values()) < 0.3 * len(train_questions)


def test_yes_and_no_are_balanced(train_questions):
    for question_type in ("is there a", "are there more", "is the"):
        answers = Counter(q.answer for _, q in train_questions if q.question_type == question_type)
        assert set(answers) == {"yes", "no"}
        assert 0.42 < answers["yes"] / answers.total() < 0.58


def test_words_alone_answer_a_third_to_a_half(train_questions):
    by_text, by_type = defaultdict(Counter), defaultdict(Counter)
    for _, question in train_questions:
        by_text[question.text][question.answer] += 1
        by_type[question.question_type][question.answer] += 1
    test_questions = [question for _, question in asked(seed=1)]
    right = 0
    for question in test_questions:
        counts = by_text.get(question.text, by_type[question.question_type])
        right += counts.most_common(1)[0][0] == question.answer
    assert 0.25 < right / len(test_questions) < 0.5


def test_questions_of_a_scene_differ_even_when_many():
    generator = numpy.random.default_rng(4)
    for _ in range(50):
        texts = [q.text for q in shapes_language.questions(sample_scene(generator), generator, 20)]
        assert len(set(texts)) == 20


def test_sentences_are_reproducible_and_hold_no_answers():
    first, second = (shapes_language.sentences(numpy.random.default_rng(7), 40) for _ in range(2))
    assert first == second and len(first) == 40
    assert all(sentence.endswith("?") for sentence in first[1::2])
    assert all(sentence.endswith(".") for sentence in first[::2])


# The stage


def arguments(output, **changed) -> argparse.Namespace:
    options = {
        "seed": 5,
        "train-images": 12,
        "val-images": 4,
        "test-images": 4,
        "image-size": 32,
        "questions-per-image": 3,
    }
    options |= changed
    parser = argparse.ArgumentParser()
    world.add_arguments(parser)
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return parser.parse_args([*line, "--output", str(output)])


def hashes(folder) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "world"
    world.run(arguments(folder))
    return folder


def test_world_is_in_the_official_formats(small_world):
    image_ids, question_ids, caption_ids = [], [], []
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        captions = read_captions(small_world / split / "captions.json")
        assert {"info", "licenses", "images", "annotations"} <= captions.keys()
        assert all(image["width"] == image["height"] == 32 for image in captions["images"])
        files = ImageFolder(small_world / split / "images").numbered
        assert files == {image["id"]: [image["file_name"]] for image in captions["images"]}
        assert len(files) == count and len(captions["annotations"]) == 5 * count
        questions, annotations = read_pair(small_world / split / "questions.json", small_world / split / "annotations.json")
        assert len(questions) == 3 * count
        assert {question["image_id"] for question in questions} == set(files)
        for annotation in annotations:
            answers = [entry["answer"] for entry in annotation["answers"]]
            assert [entry["answer_id"] for entry in annotation["answers"]] == list(range(1, 11))
            assert answers.count(annotation["multiple_choice_answer"]) >= 6
            assert {entry["answer_confidence"] for entry in annotation["answers"]} <= {"yes", "maybe", "no"}
        image_ids += files
        question_ids += [question["question_id"] for question in questions]
        caption_ids += [caption["id"] for caption in captions["annotations"]]
    for ids in (image_ids, question_ids, caption_ids):
        assert len(set(ids)) == len(ids)


def test_annotators_disagree_a_little():
    generator = numpy.random.default_rng(0)
    answers = [a["answer"] for _ in range(500) for a in world.annotators_answers("purple", generator)]
    assert 0.88 < answers.count("purple") / len(answers) < 0.96
    assert "violet" in answers and "red" in answers


def test_same_seed_same_bytes(small_world, tmp_path):
    world.run(arguments(tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(small_world)
    world.run(arguments(tmp_path / "other", seed=6))
    assert hashes(tmp_path / "other") != hashes(small_world)


def test_more_train_images_change_nothing_else(small_world, tmp_path):
    world.run(arguments(tmp_path / "larger", **{"train-images": 15}))
    small, large = hashes(small_world), hashes(tmp_path / "larger")
    grown = {f"train/{name}.json" for name in ("captions", "questions", "annotations")}
    assert {name for name in small if small[name] != large[name]} == grown
    assert len(large) == len(small) + 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train-images", 0),
        ("image-size", 8),
        ("questions-per-image", 21),
        ("seed", -1),
        ("train-images", "many"),
    ],
)
def test_options_out_of_range(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        arguments(tmp_path / "world", **{option: value})
    assert f"argument --{option}: " in capsys.readouterr().err
