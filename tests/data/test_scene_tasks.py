"""Scenes as tasks: answers are what the scene says, no short cut tells them, and items depend on nothing but a number.

`pytest -s` prints the figures of docs/data.md. The judge of answers is written here and shares no code with theirs.
"""

import itertools
import json
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmfast import cli
from vlmfast.data import scenes
from vlmfast.data.conversation import LlavaJson
from vlmfast.data.scenes import instruct, pope, programs, questions, tasks
from vlmfast.data.scenes.latents import HELD_OUT, attributes, sample
from vlmfast.data.scenes.render import render
from vlmfast.data.scenes.shapes import SHAPES
from vlmfast.errors import DataError
from vlmfast.eval.predictions import read_references

LEVELS = ("L1", "L2", "L3")
APART = 123 / 1024


def asked(level, n, split="train", **options):
    """(scenes, first question of each as its truth) of n items."""
    data = tasks.dataset(level, split, "vqa", size=n, **options)
    latents, items = data.read(range(n))
    every = [exchanges[0] for exchanges in items]
    truths = [each.truth() | {"question": each.question, "answer": each.answer} for each in every]
    return latents.scenes(), truths


# A judge of questions: it reads the words, not the program.

PLURALS = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES}, "things": "thing"}
KINDS = {word: kind for kind, words in questions.VALUES.items() for word in words}
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right", "at the top",
          "at the bottom", "at the left", "at the right", "in the center")  # fmt: skip
SIDES = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}


def fitting(words, scene):
    """The things that the words may mean."""
    things = list(scene.objects)
    if side := next((side for side in SIDES if f" {side} the " in f" {words}"), None):
        words, anchor = words.split(f" {side} the ")
        (anchor,) = fitting(anchor, scene)
        axis, sign = SIDES[side]
        gaps = {t.id: sign * ((anchor.x, anchor.y)[axis] - (t.x, t.y)[axis]) for t in things}
        things = [t for t in things if t.id != anchor.id and gaps[t.id] > 0]
        said = [t for t in things if not any(KINDS.get(w) and getattr(t, KINDS[w]) != w for w in words.split())]
        assert all(gaps[t.id] >= APART for t in said)
        assert all(
            abs(gaps[t.id]) >= APART for t in scene.objects if t.id != anchor.id and len(said) == 1 and t in said
        )
    if place := next((place for place in PLACES if words.endswith(place)), None):
        things = [t for t in things if t.place == place.removeprefix("at the ").removeprefix("in the ")]
        words = words.removesuffix(place)
    for word in words.split():
        word = PLURALS.get(word, word)
        if kind := KINDS.get(word):
            things = [t for t in things if getattr(t, kind) == word]
        else:
            assert word in ("a", "an", "the", "thing", "no", "there"), word
    return things


def one(words, scene):
    (thing,) = fitting(words, scene)
    return thing


def judged(question, scene):
    """The answer to a question's words."""
    text = question.rstrip("?")
    start, _, rest = text.partition(" ")
    if start == "What":
        kind, rest = rest.split(" ", 1)
        what = rest.removeprefix("is the ").removeprefix("does the ").removesuffix(" have")
        return getattr(one(what, scene), kind)
    if start == "How":
        return str(len(fitting(rest.removeprefix("many ").removesuffix(" are there"), scene)))
    if text.startswith("Are there"):
        which, rest = text.removeprefix("Are there ").split(" ", 1)
        a, b = (len(fitting(part, scene)) for part in rest.split(" than "))
        assert a != b
        return yes(a > b if which == "more" else a < b)
    if text.startswith("Is there no "):
        return yes(not fitting(text.removeprefix("Is there no "), scene))
    if text.startswith("Is there"):
        parts = text.removeprefix("Is there ")
        for word, rule in ((" and ", all), (" or ", any)):
            if word in parts:
                return yes(rule(bool(fitting(part, scene)) for part in parts.split(word)))
        return yes(fitting(parts, scene))
    if start == "Does":
        which = "same" if " the same " in text else "different"
        left, right = rest.split(f" have {'the same' if which == 'same' else 'a different'} ")
        kind, other = right.split(" as the " if which == "same" else " from the ")
        a, b = (getattr(one(words, scene), kind) for words in (left.removeprefix("the "), other))
        return yes((a == b) == (which == "same"))
    rest = rest.removeprefix("the ")
    for word, sign in (("bigger", 1), ("smaller", -1)):
        if f" {word} than the " in rest:
            a, b = (one(words, scene).radius for words in rest.split(f" {word} than the "))
            return yes(sign * (a - b) > 0)
    side = next(side for side in SIDES if f" {side} the " in rest)
    a, b = (one(words, scene) for words in rest.split(f" {side} the "))
    axis, sign = SIDES[side]
    gap = sign * ((b.x, b.y)[axis] - (a.x, a.y)[axis])
    assert abs(gap) >= APART
    return yes(gap > 0)


def yes(fact):
    return "yes" if fact else "no"


@pytest.mark.parametrize("split", ["train", "comp-test"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_is_right_by_its_words_and_by_its_program(level, split):
    for scene, truth in zip(*asked(level, 700 if split == "train" else 100, split), strict=True):
        assert judged(truth["question"], scene) == truth["answer"], truth
        assert programs.execute(truth["program"], scene) == truth["answer"]
        assert programs.execute(json.loads(json.dumps(truth["program"])), scene) == truth["answer"]
        assert truth["answer"] in truth["candidates"]


def test_held_out_pairs_are_not_spoken_of_in_training():
    pairs = {f" {questions.COLOURS[c]} {SHAPES[s]}" for s, c in HELD_OUT}
    texts = list(tasks.dataset("L2", "train", "vqa", size=1500, families=["exist", "relate", "compare"]).texts())
    assert not [text for text in texts if any(pair in text for pair in pairs)]
    held = list(tasks.dataset("L2", "comp-test", "vqa", size=200, families=["exist"]).texts())
    assert sum(any(pair in text for pair in pairs) for text in held) > 20


# Balance.


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_uniform_within_each_predicate(level):
    from scipy.stats import chisquare

    known = questions.predicates(level)
    counts = defaultdict(Counter)
    _, truths = asked(level, 3000)
    for truth in truths:
        counts[truth["family"], truth["predicate"]][truth["answer"]] += 1
    assert {family for family, _ in counts} == set(known)
    p = {
        name: chisquare([count[answer] for answer in known[name[0]][name[1]]]).pvalue for name, count in counts.items()
    }
    assert min(p.values()) > 1e-3, p
    families = Counter(truth["family"] for truth in truths)
    assert chisquare(list(families.values())).pvalue > 1e-3
    for family in known:
        own = [truth for truth in truths if truth["family"] == family]
        best = defaultdict(Counter)
        for truth in own:
            best[truth["predicate"]][truth["answer"]] += 1
        majority = sum(max(count.values()) for count in best.values()) / len(own)
        print(f"{level}: {family}: prior {questions.prior(family, level):.3f}, majority of {len(own)} {majority:.3f}")
        assert majority < questions.prior(family, level) + 0.12  # a majority of few is more than its share


@pytest.mark.parametrize("level", LEVELS)
def test_the_question_alone_does_not_tell_the_answer(level):
    """Words and pairs of words, logistic regression. Family by family with more items: `-m long`."""
    n = 2500
    train, test = (asked(level, n, split)[1] for split in ("train", "test"))
    scores, priors = [], []
    for family in questions.predicates(level):
        score, count = text_only(*([t for t in each if t["family"] == family] for each in (train, test)))
        scores.append(score * count)
        priors.append(questions.prior(family, level) * count)
        # Three points, and three standard errors of so few.
        assert score <= questions.prior(family, level) + 0.03 + 3 * (0.25 / count) ** 0.5, (family, score)
    print(f"{level}: question alone: {sum(scores) / n:.3f}, prior {sum(priors) / n:.3f}")
    assert sum(scores) <= sum(priors) + 0.03 * n


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
def test_no_family_is_told_by_its_questions_alone(level):
    for family in questions.predicates(level):
        train, test = (asked(level, 5000, split, families=[family])[1] for split in ("train", "test"))
        score, _ = text_only(train, test)
        print(f"{level}: {family} from 5000 questions alone: {score:.3f}, prior {questions.prior(family, level):.3f}")
        assert score <= questions.prior(family, level) + 0.03


def text_only(train, test):
    """(accuracy, number of tested) of a classifier that reads questions."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"[a-z0-9-]+")
    counts = words.fit_transform([truth["question"] for truth in train])
    model = LogisticRegression(C=0.1, max_iter=300).fit(counts, [truth["answer"] for truth in train])
    hits = model.predict(words.transform([t["question"] for t in test])) == np.array([t["answer"] for t in test])
    return hits.mean(), len(test)


def test_the_text_only_classifier_can_learn():
    truths = [{"question": f"Is there a {k % 7} thing?", "answer": yes(k % 7 < 3)} for k in range(700)]
    assert text_only(truths[:350], truths[350:])[0] == 1


@pytest.mark.parametrize("level", ["L1", "L3"])
def test_pixels_without_the_question_do_not_tell_the_answer(level):
    from sklearn.neighbors import KNeighborsClassifier

    data = tasks.dataset(level, "train", "vqa", size=2000)
    latents, items = data.read(range(2000))
    pixels = render(latents, 16).reshape(2000, -1).astype(np.float32)
    answers = np.array([exchanges[0].answer for exchanges in items])
    model = KNeighborsClassifier(25).fit(pixels[:1500], answers[:1500])
    score, chance = model.score(pixels[1500:], answers[1500:]), Counter(answers[1500:]).most_common(1)[0][1] / 500
    print(f"{level}: answer from the image alone: {score:.3f}, most frequent answer {chance:.3f}")
    assert score <= chance + 0.03


# Items depend on their number alone.


def same(a, b):
    return a.conversation == b.conversation and torch.equal(a.image, b.image)


@pytest.mark.parametrize(
    ("task", "options"),
    [("caption", {"granularity": "mixed"}), ("vqa", {}), ("vqa", {"questions_per_image": 4}), ("instruct", {}),
     ("pope-popular", {"cooc": True})],
)  # fmt: skip
@pytest.mark.parametrize("level", ["L1", "L3"])
def test_an_item_is_the_same_alone_in_a_batch_and_in_any_order(level, task, options):
    if options.get("cooc") and level != "L3":
        return
    numbers = [40, 3, 0, 299, 41, 3]
    data = tasks.dataset(level, "val", task, size=300, image_size=32, **options)
    together, backwards = data.__getitems__(numbers), data.__getitems__(numbers[::-1])[::-1]
    other = tasks.dataset(level, "val", task, size=500, image_size=32, **options)
    for number, a, b in zip(numbers, together, backwards, strict=True):
        assert same(a, b)
        assert same(a, other[number])
        assert data.truth(number)["answer"] == a.conversation.turns[1].text
    different = tasks.dataset(level, "val", task, size=300, image_size=32, seed=1, **options)[40]
    assert not torch.equal(different.image, together[0].image)


def test_the_item_shows_the_scene_it_asks_about():
    data = tasks.dataset("L2", "test", "vqa", size=20, image_size=48)
    for number, item in enumerate(data.__getitems__(range(20))):
        truth = data.truth(number)
        scene = sample("L2", "test", [truth["scene"]])
        assert torch.equal(item.image[0], torch.from_numpy(render(scene, 48))[0])
        assert item.conversation.turns[0].text == f"<image>\n{truth['question']}"
        assert programs.execute(truth["program"], scene.scene(0)) == item.conversation.turns[1].text


def test_several_questions_an_image():
    data = tasks.dataset("L2", "train", "vqa", size=400, questions_per_image=4)
    latents, items = data.read(range(400))
    families = Counter()
    for scene, exchanges in zip(latents.scenes(), items, strict=True):
        assert len({each.question for each in exchanges}) == len(exchanges) == 4
        for each in exchanges:
            families[each.truth()["family"]] += 1
            assert programs.execute(each.truth()["program"], scene) == each.answer
    assert min(families.values()) > 0.6 * 1600 / len(families)
    turns = data[0].conversation.turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * 4
    assert [turn.text.count("<image>") for turn in turns] == [1] + [0] * 7
    assert data.truth(0, turn=2)["answer"] == turns[5].text


def test_many_questions_of_few_predicates():
    asked = ["exist:shape", "exist:colour", "query-size"]
    data = tasks.dataset("L2", "train", "vqa", size=200, families=asked, questions_per_image=8)
    latents, items = data.read(range(200))
    found = Counter()
    for scene, exchanges in zip(latents.scenes(), items, strict=True):
        assert len({each.question for each in exchanges}) == len(exchanges) <= 8
        for each in exchanges:
            truth = each.truth()
            found[f"{truth['family']}:{truth['predicate']}"] += 1
            assert programs.execute(truth["program"], scene) == each.answer
    assert found.keys() == {"exist:shape", "exist:colour", "query-size:size"}
    assert found.total() > 6 * 200  # of two to four objects no more than so many sizes can be asked


def test_captions_have_one_right_answer_and_all_references():
    data = tasks.dataset("L1", "train", "caption", size=30, granularity="mixed")
    for number, text in enumerate(data.texts()):
        truth = data.truth(number)
        scene = scenes.dataset("L1").scene(number)
        assert truth["answer"] == scenes.caption(scene, truth["granularity"], 0, "reading") == truth["references"][0]
        assert text == f"{tasks.INSTRUCTIONS[truth['granularity']]}\n{truth['answer']}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chat"}, "task must be one of caption, vqa, instruct, pope-random.*'chat'"),
        ({"level": "L0", "task": "vqa"}, "levels with questions are L1, L2, L3, L3-cooc; got 'L0'"),
        ({"level": "L0", "task": "instruct"}, "levels with questions are"),
        ({"task": "vqa", "families": ["query-texture"]}, "families at L1, and.*exist \\(shape.*query-texture"),
        ({"task": "vqa", "families": ["exist:texture"]}, "exist \\(shape, colour.*got 'exist:texture'"),
        ({"task": "vqa", "families": []}, "a family and a question an image at least"),
        ({"task": "vqa", "questions_per_image": 0}, "a family and a question an image at least"),
        ({"cooc": True}, "cooc=True is a variant of level L3; got level 'L1'"),
        ({"granularity": "essay"}, "granularity must be one of"),
        ({"size": 0}, "a task has 1 .. 2"),
        ({"image_size": 8}, "image_size must be 16 .. 2048"),
        ({"level": "L1", "task": "pope-random"}, "asks about 3 shapes; levels with so many are L2, L3, L3-cooc"),
    ],
)
def test_bad_arguments_of_tasks_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        tasks.dataset(**arguments)


# The interpreter.


def test_programs_that_make_no_sense_are_refused():
    scene = scenes.dataset("L2").scene(0)
    a, b = replace(scene.objects[0], x=0.3, y=0.2), replace(scene.objects[1], x=0.35, y=0.8)
    scene = replace(scene, objects=(a, b))
    first, second = (("filter", "colour", t.colour, ("filter", "shape", t.shape, ("all",))) for t in (a, b))
    assert programs.execute(("relates", "above", first, second), scene) == "yes"
    with pytest.raises(DataError, match="is too close to call in scene 0 of L2/train"):
        programs.execute(("relates", "left of", first, second), scene)
    with pytest.raises(DataError, match="should be one object; scene 0 of L2/train has 2"):
        programs.execute(("query", "colour", ("all",)), scene)
    with pytest.raises(DataError, match="is no relation"):
        programs.execute(("relates", "near", first, second), scene)
    for program, message in ((("guess", ("all",)), "is no program"), (("count", ("some",)), "is no set of objects")):
        with pytest.raises(DataError, match=message):
            programs.execute(program, scene)


# POPE.


def test_company_comes_in_six_pairs():
    here = pope.presence(attributes("L3-cooc", "train", np.arange(4000)))
    share = here.mean(0)
    lift = pope.together(here) / len(here) / np.outer(share, share)
    strong = {frozenset((SHAPES[a], SHAPES[b])) for a, b in itertools.combinations(range(12), 2) if lift[a, b] >= 4}
    groups = (("star", "heart", "crescent"), ("ring", "arrow", "car"))
    assert strong == {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}
    assert (here.sum(1) == 3).all()


def test_every_thing_has_a_distractor():
    for level in ("L3", "L3-cooc"):
        for scene in sample(level, "train", np.arange(400)).scenes():
            assert 3 <= len(scene.objects) <= 9
            for thing in scene.objects:
                others = [other for other in scene.objects if other.id != thing.id]
                assert any(thing.shape == other.shape or thing.colour == other.colour for other in others)


@pytest.mark.parametrize("strategy", pope.STRATEGIES)
def test_pope_sets_are_balanced_and_true(strategy):
    data = tasks.dataset("L3", "val", f"pope-{strategy}", size=600, cooc=True)
    latents, items = data.read(range(600))
    truths = [exchanges[0] for exchanges in items]
    assert [each.answer for each in truths] == ["yes", "no"] * 300
    for scene, each in zip(latents.scenes(), truths, strict=True):
        shape = each.truth()["program"][1][2]
        article = "an" if shape == "arrow" else "a"
        assert each.question == f"Is there {article} {shape} in the image?"
        assert (shape in {thing.shape for thing in scene.objects}) == (each.answer == "yes")
    for k in range(0, 600, 6):
        assert len({each.question for each in truths[k : k + 6]}) == 6
        assert len(set(latents.index[k : k + 6].tolist())) == 1
    assert len(set(latents.index.tolist())) == 100


def test_pope_sets_are_read_from_several_threads(monkeypatch):
    def slow(*arguments):
        for each in pope.pope(*arguments):
            time.sleep(0.001)  # in which another thread asks
            yield each

    places = range(0, 120, 6)
    alone = [tasks.dataset("L2", "train", "pope-random", 120).truth(place)["scene"] for place in places]
    monkeypatch.setattr(tasks, "pope", slow)
    data = tasks.dataset("L2", "train", "pope-random", 120)
    with ThreadPoolExecutor(4) as pool:
        assert [about["scene"] for about in pool.map(data.truth, places)] == alone


def test_negatives_are_what_their_names_say():
    counts = pope.together(pope.presence(attributes("L3-cooc", "train", np.arange(pope.COUNTED))))
    for strategy in ("popular", "adversarial"):
        for index, six in itertools.islice(pope.pope("L3-cooc", "val", strategy), 25):
            present = {thing.shape for thing in sample("L3-cooc", "val", [index]).scene(0).objects}
            before = set()
            for positive, negative in zip(six[::2], six[1::2], strict=True):
                yes, no = (SHAPES.index(each.program[1][2]) for each in (positive, negative))
                rank = np.diag(counts) if strategy == "popular" else counts[:, yes]
                free = [k for k, shape in enumerate(SHAPES) if shape not in present and k not in before]
                assert rank[no] == max(rank[free])
                before.add(no)


def test_a_prior_alone_is_tempted_by_adversarial_questions():
    train = sample("L3-cooc", "train", np.arange(1000)).scenes()
    captions = [scenes.caption(scene, "paragraph", 0) for scene in train]
    scores = {}
    for strategy in pope.STRATEGIES:
        every = [six for _, six in itertools.islice(pope.pope("L3-cooc", "val", strategy), 500)]
        answers = pope.prior_answers([[each.program[1][2] for each in six] for six in every], captions)
        pairs = zip(itertools.chain(*answers), (each.answer for six in every for each in six), strict=True)
        scores[strategy] = sum(a == b for a, b in pairs) / 3000  # as many yes as no: F1 is the same number
    print(f"POPE, prior alone: {scores}")
    assert scores["adversarial"] < 0.55
    assert scores["random"] >= scores["adversarial"] + 0.2


# Instructions.


@pytest.mark.parametrize("level", LEVELS)
def test_instructions_hold_and_come_in_three_kinds(level):
    data = tasks.dataset(level, "train", "instruct", size=300)
    latents, items = data.read(range(300))
    told = []
    for scene, exchanges in zip(latents.scenes(), items, strict=True):
        kinds = {each.truth()["kind"] for each in exchanges}
        assert len(kinds) == 1
        told.append((kinds.pop(), [(each.question, each.answer) for each in exchanges]))
        for each in exchanges:
            assert each.truth()["checks"]
            assert all(programs.execute(program, scene) == answer for program, answer in each.truth()["checks"])
    summary = instruct.summary(told)
    print(f"{level}: {summary}")
    assert set(summary["kinds"]) == set(instruct.KINDS)
    assert summary["repeats"] < 0.3
    assert summary["answer_entropy_bits"] > 7


def test_an_instruction_that_does_not_hold_is_refused(monkeypatch):
    scene = scenes.dataset("L1").scene(0)
    monkeypatch.setattr(instruct, "execute", lambda program, scene: "purple")
    with pytest.raises(DataError, match="does not hold in scene 0 of L1/train"):
        instruct.instruct(scene)


def test_a_summary_counts():
    told = [("detail", [("q", "a b")]), ("detail", [("q", "a b")]), ("reasoning", [("q", "x " * 12), ("r", "y")])]
    found = instruct.summary(told)
    assert found["kinds"] == {"detail": 2, "reasoning": 1}
    assert found["repeats"] == pytest.approx(1 / 3)
    assert found["answer_words"] == {"0-9": 3, "10-19": 1}
    assert found["answer_entropy_bits"] == pytest.approx(1.5)


# Files.


def test_an_export_comes_back_as_llavas_json(tmp_path):
    data = tasks.dataset("L2", "val", "vqa", size=20, questions_per_image=2)
    written = scenes.export_task(tmp_path / "out", data)
    assert {path.name for path in written if path.suffix != ".png"} == {"conversations.json", "references.jsonl"}
    back = LlavaJson(tmp_path / "out" / "conversations.json", tmp_path / "out" / "images", (96, 96))
    assert len(back) == 20
    assert not back.skips.describe()
    for ours, theirs in zip(data.__getitems__(range(20)), (back[k] for k in range(20)), strict=True):
        assert same(ours, theirs)
    truths = read_references(tmp_path / "out" / "references.jsonl")
    for k in range(20):
        truth = data.truth(k)
        assert truths[f"vqa-{k}"].references == (truth["answer"],)
        assert truths[f"vqa-{k}"].group == truth["family"]


def test_pope_is_written_as_published(tmp_path, capsys):
    flags = ["--format", "llava", "--task", "pope-adversarial", "--level", "L2", "--split", "val", "--size", "13"]
    assert cli.main(["data", "export", "--out", str(tmp_path / "out"), *flags]) == 0
    assert "13 conversations (pope-adversarial) about L2 in 6 files" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "pope.json").read_text().splitlines()]
    data = tasks.dataset("L2", "val", "pope-adversarial", size=13)
    for k, row in enumerate(rows):
        truth = data.truth(k)
        image = f"{truth['scene']}.png"
        assert row == {"question_id": k + 1, "image": image, "text": truth["question"], "label": truth["answer"]}
        assert (tmp_path / "out" / "images" / image).is_file()
    assert len(rows) == 13
    assert read_references(tmp_path / "out" / "pope.json")


def test_the_export_of_instructions_tells_what_they_are_like(tmp_path, capsys):
    flags = ["--format", "llava", "--task", "instruct", "--level", "L1", "--size", "15"]
    assert cli.main(["data", "export", "--out", str(tmp_path / "out"), *flags]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out[out.index("{") :])
    assert sum(summary["kinds"].values()) == 15
    assert 0 < summary["answer_entropy_bits"] <= summary["answer_entropy_most_bits"]
    truths = read_references(tmp_path / "out" / "references.jsonl")
    assert {truth.group for truth in truths.values()} <= set(instruct.KINDS)


def test_export_refuses_flags_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLMFAST_DEBUG", raising=False)
    assert cli.main(["data", "export", "--out", str(tmp_path / "out"), "--task", "vqa"]) == 1
    assert "add --format llava" in capsys.readouterr().err
    for words, message in (
        (["--questions-per-image", "2"], "--questions-per-image is for --task vqa; got --task caption"),
        (["--task", "vqa", "--granularity", "word"], "--granularity is of captions; got --task vqa"),
        (["--shard-size", "5"], "--shard-size is for the other formats"),
    ):
        assert cli.main(["data", "export", "--out", str(tmp_path / "out"), "--format", "llava", *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="is not empty"):
        scenes.export_task(tmp_path, tasks.dataset(size=1))
    with pytest.raises(DataError, match="image_type must be one of png, jpg; got 'gif'"):
        scenes.export_task(tmp_path / "out", tasks.dataset(size=1), "gif")
