"""The demo world: true and unambiguous questions, balanced answers, official formats, determinism."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict

import numpy
import pytest

from routevl.data import shapes_language, world
from routevl.data.coco import read_captions
from routevl.data.gqa import read_questions
from routevl.data.image_files import ImageFolder
from routevl.data.nlvr2 import read_examples
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
from routevl.data.shapes_gqa import GqaQuestion, gqa_questions
from routevl.data.shapes_nlvr2 import statements
from routevl.data.vqav2 import read_pair
from routevl.files import sha256_of
from routevl.metrics import gqa

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


@pytest.mark.parametrize("ask", [shapes_language.questions, gqa_questions])
def test_questions_of_a_scene_differ_even_when_many(ask):
    generator = numpy.random.default_rng(4)
    for _ in range(50):
        texts = [q.text for q in ask(sample_scene(generator), generator, shapes_language.MOST_QUESTIONS)]
        assert len(set(texts)) == 20


def test_sentences_are_reproducible_and_hold_no_answers():
    first, second = (shapes_language.sentences(numpy.random.default_rng(7), 40) for _ in range(2))
    assert first == second and len(first) == 40
    assert all(sentence.endswith("?") for sentence in first[1::2])
    assert all(sentence.endswith(".") for sentence in first[::2])


# GQA-like questions


@pytest.fixture(scope="module")
def gqa_asked() -> list[tuple[Scene, GqaQuestion]]:
    generator = numpy.random.default_rng(10)
    scenes = [sample_scene(generator) for _ in range(SCENES)]
    return [(scene, question) for scene in scenes for question in gqa_questions(scene, generator, QUESTIONS)]


NAME = rf"(the (?:(?:{'|'.join(SIZES + COLORS)}) )*(?:thing|{'|'.join(SHAPES)}))"
RELATION = r"(left of|right of|above|below)"


def gqa_answer(scene: Scene, question: str) -> tuple[str, str, str]:
    """The answer, and structural and semantic type, by the words of the question."""
    if match := re.fullmatch(rf"what (color|shape|size) is the thing {RELATION} {NAME}\?", question):
        return getattr(related(scene, match[2], match[3]), match[1]), "query", "rel"
    if match := re.fullmatch(rf"what (color|shape|size) is {NAME}\?", question):
        return getattr(the_only(scene, match[2]), match[1]), "query", "attr"
    if match := re.fullmatch(rf"do {NAME} and {NAME} have the same (color|shape|size)\?", question):
        first, second = (the_only(scene, match[place]) for place in (1, 2))
        assert first is not second
        return whether(getattr(first, match[3]) == getattr(second, match[3])), "compare", "attr"
    if match := re.fullmatch(r"is there an? ([\w ]+?) (and|or) an? (.+)\?", question):
        there = [bool(matching(scene, match[place])) for place in (1, 3)]
        return whether(all(there) if match[2] == "and" else any(there)), "logical", "obj"
    if match := re.fullmatch(r"is there an? (.+)\?", question):
        return whether(bool(matching(scene, match[1]))), "verify", "obj"
    if match := re.fullmatch(rf"is {NAME} {RELATION} or {RELATION} {NAME}\?", question):
        first, second = the_only(scene, match[1]), the_only(scene, match[4])
        [true] = [relation for relation in match.group(2, 3) if apart(first, relation, second) and holds(first, relation, second)]
        return true, "choose", "rel"
    if match := re.fullmatch(rf"is {NAME} {RELATION} {NAME}\?", question):
        first, second = the_only(scene, match[1]), the_only(scene, match[3])
        assert apart(first, match[2], second)
        return whether(holds(first, match[2], second)), "verify", "rel"
    match = re.fullmatch(rf"is {NAME} (?:an? )?(\w+)(?: or (?:an? )?(\w+))?\?", question)
    thing = the_only(scene, match[1])
    if match[3] is None:
        return whether(match[2] in (thing.shape, thing.color, thing.size)), "verify", "attr"
    [true] = {match[2], match[3]} & {thing.shape, thing.color, thing.size}
    return true, "choose", "attr"


def test_every_gqa_question_has_one_answer_and_it_is_the_given_one(gqa_asked):
    for scene, question in gqa_asked:
        assert gqa_answer(scene, question.text) == (question.answer, question.structural, question.semantic), (scene, question)


def test_the_full_answers_are_true(gqa_asked):
    """Those about one thing, read as questions again."""
    for scene, question in gqa_asked:
        statement = question.full_answer.removeprefix("yes, ").removeprefix("no, ")
        assert question.full_answer.endswith(".") and statement[0].islower()
        assert question.full_answer.startswith(f"{question.answer}, ") == (question.answer in ("yes", "no"))
        if match := re.fullmatch(rf"{NAME} is {RELATION} {NAME}\.", statement):
            assert holds(the_only(scene, match[1]), match[2], the_only(scene, match[3]))
        elif match := re.fullmatch(rf"{NAME} is (?:an? )?(\w+)\.", statement):
            thing = the_only(scene, match[1])
            assert match[2] in (thing.shape, thing.color, thing.size)


def test_gqa_questions_are_of_every_type_and_balanced(gqa_asked):
    kinds = Counter((question.structural, question.semantic) for _, question in gqa_asked)
    assert set(kinds) == {
        *(("query", kind) for kind in ("attr", "rel")),
        *(("verify", kind) for kind in ("attr", "rel", "obj")),
        *(("choose", kind) for kind in ("attr", "rel")),
        ("logical", "obj"),
        ("compare", "attr"),
    }
    for structural in ("verify", "logical"):
        answers = Counter(question.answer for _, question in gqa_asked if question.structural == structural)
        assert set(answers) == {"yes", "no"} and 0.42 < answers["yes"] / answers.total() < 0.58
    offered = [question for _, question in gqa_asked if question.structural == "choose"]
    first = sum(question.text.index(question.answer) < question.text.index(" or ") for question in offered)
    assert 0.42 < first / len(offered) < 0.58


# NLVR2-like statements

NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]


def is_true(statement: str, left: Scene, right: Scene) -> bool:
    """Whether a statement holds, by its words."""
    scenes = {"left": left, "right": right}

    def counts(phrase: str) -> list[int]:
        return [len(matching(scene, phrase)) for scene in scenes.values()]

    if match := re.fullmatch(r"the (left|right) image has an? (.+)\.", statement):
        return bool(matching(scenes[match[1]], match[2]))
    if match := re.fullmatch(r"the (left|right) image has more (.+) than the (left|right) image\.", statement):
        more, less = (len(matching(scenes[match[place]], match[2])) for place in (1, 3))
        return match[1] != match[3] and more > less
    if match := re.fullmatch(r"there (?:is|are) (\w+) things? in the (left|right) image\.", statement):
        return len(scenes[match[2]].things) == NUMBERS.index(match[1])
    if match := re.fullmatch(r"there (?:is|are) (\w+) (.+) in the two images together\.", statement):
        return sum(counts(match[2])) == NUMBERS.index(match[1])
    if match := re.fullmatch(rf"in the (left|right) image an? (.+) is {RELATION} an? (.+)\.", statement):
        first, second = (matching(scenes[match[1]], match[place]) for place in (2, 4))
        return any(apart(a, match[3], b) and holds(a, match[3], b) for a in first for b in second)
    match = re.fullmatch(r"(both images have|(?:only one|at least one|none) of the images has) an? (.+)\.", statement)
    having = sum(count > 0 for count in counts(match[2]))
    wanted = {"both images have": {2}, "only one": {1}, "at least one": {1, 2}, "none": {0}}
    return having in wanted[match[1].removesuffix(" of the images has")]


def test_statements_are_true_of_half_of_their_pairs():
    generator = numpy.random.default_rng(12)
    opening: Counter[str] = Counter()
    for _ in range(500):
        pairs = [(sample_scene(generator), sample_scene(generator)) for _ in range(4)]
        made = statements(pairs, generator, 2)
        assert len({statement.text for statement in made}) == 2
        for statement in made:
            truths = [is_true(statement.text, *pair) for pair in pairs]
            assert truths == [statement.holds(*pair) for pair in pairs], statement.text
            assert sum(truths) == 2
            opening[" ".join(statement.text.split()[:2])] += 1
    assert opening.keys() >= {"the left", "the right", "there are", "there is", "in the", "both images", "only one", "none of"}
    assert max(opening.values()) < 0.4 * opening.total()


def test_pairs_that_are_all_alike_have_no_statement():
    generator = numpy.random.default_rng(13)
    pair = (sample_scene(generator), sample_scene(generator))
    assert statements([pair] * 4, generator, 2) == []


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


def test_world_has_questions_in_the_form_of_gqa(small_world, tmp_path):
    ids: list[str] = []
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        questions = read_questions(small_world / split / "gqa_questions.json")
        assert len(questions) == world.GQA_QUESTIONS * count and all(name.startswith("0") for name in questions)
        files = {path.stem for path in (small_world / split / "images").iterdir()}
        assert {question["imageId"] for question in questions.values()} == files
        assert all(question["isBalanced"] and question["answer"] and question["types"] for question in questions.values())
        ids += questions
        answers = [{"questionId": name, "prediction": question["answer"]} for name, question in questions.items()]
        (tmp_path / "results.json").write_text(json.dumps(answers))
        scores = gqa.score_files(small_world / split / "gqa_questions.json", tmp_path / "results.json")
        assert scores.overall == 100 and set(scores.by_answer_type) == {"binary", "open"}
    assert len(set(ids)) == len(ids)


def test_world_has_sentences_about_pairs_of_its_images_in_the_form_of_nlvr2(small_world):
    for split, sets in (("train", 1), ("val", 1), ("test", 1)):
        examples = read_examples(small_world / split / "nlvr2.jsonl")
        folder = ImageFolder(small_world / split / "images")
        labels = defaultdict(list)
        for example in examples:
            left, right = ({folder.find(-1, name) for name in names} - {None} for names in (example.left, example.right))
            assert len(left) == len(right) == 1 and left != right
            labels[example.statement, example.sentence].append(example.label)
        assert 1 <= len(labels) <= world.NLVR2_SENTENCES * sets
        assert all(sorted(given) == [False, False, True, True] for given in labels.values())


def test_a_world_of_one_image_has_no_pairs(tmp_path):
    world.run(arguments(tmp_path / "world", **{"test-images": 1}))
    assert read_examples(tmp_path / "world/test/nlvr2.jsonl") == []


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
    grown = {f"train/{name}.json" for name in ("captions", "questions", "annotations", "gqa_questions")} | {"train/nlvr2.jsonl"}
    assert {name for name in small if small[name] != large[name]} == grown
    assert len(large) == len(small) + 3
    first, second = (read_questions(folder / "train/gqa_questions.json") for folder in (small_world, tmp_path / "larger"))
    assert first == {name: second[name] for name in first}


def test_what_is_in_the_forms_of_gqa_and_nlvr2_changes_nothing_else(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "GQA_QUESTIONS", 5)
    monkeypatch.setattr(world, "NLVR2_PAIRS", 2)
    world.run(arguments(tmp_path / "other"))
    before, after = hashes(small_world), hashes(tmp_path / "other")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{split}/{name}" for split in ("train", "val", "test") for name in ("gqa_questions.json", "nlvr2.jsonl")}


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
