"""What makes a number on scenes L0-L3 mean something: truth, balance, and no short cut.

5000 scenes of each level, and 2000 of L3, whose scenes take four times as long.

`pytest -s` prints the figures of docs/data.md.

Captions are read back by a grammar and judged by a geometry of their own, written here and not shared with the package.
"""

import functools
import itertools
import re
import warnings
from collections import Counter

import numpy as np
import pytest

from vlmfast.data import scenes
from vlmfast.data.scenes.colours import COLOURS, LAB
from vlmfast.data.scenes.latents import HELD_OUT, UNIT, Latents, sample
from vlmfast.data.scenes.render import render
from vlmfast.data.scenes.shapes import SHAPES, TURNS

N = 5000
LEVELS = ("L0", "L1", "L2", "L3")
RICH = ("L2", "L3")
SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "dotted", "checkered", "hollow")
MEANINGS = {
    "size": {"little": "small", "tiny": "small", "medium-sized": "medium", "big": "large", "huge": "large"},
    "texture": {"chequered": "checkered", "outlined": "hollow"},
    "colour": {"grey": "gray", "violet": "purple"},
    "shape": {"disc": "circle", "plus": "cross", "hoop": "ring", "rhombus": "diamond", "moon": "crescent",
              "automobile": "car"},
}  # fmt: skip
for kind, names in (("size", SIZES), ("texture", TEXTURES), ("colour", COLOURS), ("shape", SHAPES)):
    MEANINGS[kind] |= {name: name for name in names}
ATTRIBUTE = {word: (kind, name) for kind, words in MEANINGS.items() for word, name in words.items()}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
THIRDS = {"left": (0, 0), "right": (0, 2), "top": (1, 0), "bottom": (1, 2), "center": (None, 1), "middle": (None, 1)}
RELATIONS = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}


def number(level):
    """How many scenes of a level are looked at."""
    return 2000 if level == "L3" else N


@functools.cache
def first(level):
    """(latents, scenes) of the first training samples."""
    latents = sample(level, "train", np.arange(number(level)))
    return latents, latents.scenes()


@pytest.fixture(scope="module", params=LEVELS)
def world(request):
    """(latents, scenes) of each level."""
    return first(request.param)


@pytest.fixture(scope="module", params=RICH)
def rich(request):
    """(latents, scenes) of the levels with relations."""
    return first(request.param)


# A reader of captions, and a judge.


def attributes(words):
    return dict(ATTRIBUTE[word] for word in words.split() if word in ATTRIBUTE)


def place(words):
    """{axis: third} of the place that is named, {} if none is."""
    found = re.search(r"(?:at|on|in) the (top left|top right|bottom left|bottom right|\w+)(?: side| corner)?", words)
    if not found or found[1] == "picture":
        return {}
    axes = dict(THIRDS[word] for word in found[1].split())
    return {0: axes.get(0, 1), 1: axes.get(1, 1)}


def judge(text, scene):
    """Whether everything that the text says is true of the scene."""
    things = [vars(thing) | {"at": (thing.x, thing.y)} for thing in scene.objects]

    def fits(said):
        return [thing for thing in things if all(thing[kind] == name for kind, name in said.items())]

    for statement in text.lower().rstrip(".").split(". "):
        if found := re.search(r"(\w+) shapes?\b", statement):
            if NUMBERS[found[1]] != len(things):
                return False
            continue
        if relation := next((words for words in RELATIONS if f" {words} " in statement), None):
            axis, sign = RELATIONS[relation]
            one, other = (fits(attributes(part)) for part in statement.split(f" {relation} "))
            if not any(sign * (b["at"][axis] - a["at"][axis]) > 0 for a in one for b in other):
                return False
            continue
        for clause in statement.split(" and "):
            said, thirds = attributes(clause), place(clause)
            assert said, clause
            if not any(all(int(3 * thing["at"][k]) == v for k, v in thirds.items()) for thing in fits(said)):
                return False
    return True


def test_the_judge_reads():
    scene = scenes.dataset("L2").scene(0)
    big, small = (min(scene.objects, key=lambda thing: thing.radius * sign) for sign in (-1, 1))
    assert judge(f"There is a {big.colour} {big.shape}.", scene)
    assert not judge(f"There is a {big.colour} {next(s for s in SHAPES if s != big.shape)}.", scene)
    assert not judge("Four shapes are in the picture.", scene) or len(scene.objects) == 4
    relation = "to the left of" if big.x < small.x else "to the right of"
    assert judge(f"A {big.shape} is {relation} a {small.shape}.", scene)
    assert not judge(f"A {small.shape} is {relation} a {big.shape}.", scene)
    assert place("in the top left corner there is") == {0: 0, 1: 0}
    assert place("a star is on the right side") == {0: 2, 1: 1}


def bag_of_words(text):
    return Counter(re.findall(r"[a-z-]+", text.lower()))


# (i) The oracle program is right about every caption.


@pytest.mark.parametrize("granularity", scenes.GRANULARITIES)
def test_every_caption_is_true(world, granularity):
    wrong = [text for scene in world[1] if not judge(text := scenes.caption(scene, granularity), scene)]
    assert not wrong, wrong[:5]


def test_every_claim_holds(world):
    assert all(claim.holds(scene) for scene in world[1] for claim in scenes.claims(scene, "paragraph"))


@pytest.mark.parametrize("granularity", ["sentence", "multi-sentence", "paragraph"])
@pytest.mark.parametrize("level", ["L1", *RICH])
def test_a_swapped_caption_is_false_and_has_the_same_words(level, granularity):
    pairs = [scene for scene in first(level)[1][:2500] if len(scene.objects) > 1]
    swapped = [(scene, text) for scene in pairs if (text := scenes.swapped(scene, granularity))]
    # The rest are true too; relations of a chain of nine things are true of many a scene.
    share = {"L3": 0.6}.get(level, 0.8) if granularity == "multi-sentence" else 0.97
    assert len(swapped) >= share * len(pairs)
    for scene, text in swapped:
        assert not judge(text, scene), text
        assert bag_of_words(text) == bag_of_words(scenes.caption(scene, granularity))


def test_a_caption_says_enough_to_be_found(world):
    """A sentence is true of its scene and of hardly any other: 1 of 120 at L0, where only the class is said."""
    _, every = world
    n = len(every)
    true = sum(judge(scenes.caption(every[k]), every[(k + 1) % n]) for k in range(n))
    assert true / n < (0.02 if every[0].level == "L0" else 0.001)


def test_a_relation_is_plain_to_see(rich):
    for scene in rich[1]:
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.11


# (ii) The caption alone, (iii) the image alone, (iv) pixels, (v) a bag of words do not solve the task.


@pytest.mark.parametrize("level", ["L1", *RICH])
def test_the_caption_alone_does_not_tell_true_from_swapped(level):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    latents = sample(level, "train", np.arange(2 * N if level == "L1" else N))
    pairs = [(scenes.caption(scene), scenes.swapped(scene)) for scene in map(latents.scene, range(len(latents)))]
    texts = [text for pair in pairs if pair[1] for text in pair]
    labels = np.arange(len(texts)) % 2
    half = len(texts) // 4 * 2
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"[a-z-]+").fit_transform(texts)
    model = LogisticRegression(C=0.1, max_iter=200).fit(counts[:half], labels[:half])
    score = model.score(counts[half:], labels[half:])
    print(f"{level}: true or swapped, from the caption alone: {score:.3f} of {len(texts) - half}")
    assert score <= 0.53


def test_the_image_alone_does_not_tell_true_from_swapped(rich):
    """Each image comes once with a true and once with a false caption, so any guess from the image is half right."""
    latents, every = rich
    labels = np.array([(1, 0) for scene in every[:1000] if scenes.swapped(scene)])
    guess = render(latents.take(np.arange(len(labels))), 16).reshape(len(labels), -1).mean(1) > 200
    assert 0 < guess.mean() < 1
    assert (guess[:, None] == labels).mean() == 0.5


def test_pixels_do_not_solve_the_rich_level(rich):
    """At 16 pixels a side and with few iterations, for the sake of time."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    latents, _ = rich
    n = len(latents)
    pixels = render(latents, 16).reshape(n, -1).astype(np.float32) / 255
    train, test = slice(0, n - 1000), slice(n - 1000, n)
    pixels = (pixels - pixels[train].mean(0)) / pixels[train].std()
    leftmost = np.where(latents.radius > 0, latents.x, UNIT).argmin(1)
    families = {
        name: getattr(latents, name)[np.arange(n), leftmost] for name in ("colour", "shape", "size", "texture", "place")
    }
    for name, label in {"count": latents.count, **families}.items():
        chance = np.bincount(label[test]).max() / 1000
        for model in (LogisticRegression(C=0.01, max_iter=25), KNeighborsClassifier(5)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                score = model.fit(pixels[train], label[train]).score(pixels[test], label[test])
            print(f"{latents.level}: {name} from pixels: {type(model).__name__} {score:.3f}, chance {chance:.3f}")
            assert score <= chance + 0.6 * (1 - chance), (name, model, score)


@pytest.mark.parametrize("granularity", ["sentence", "multi-sentence", "paragraph"])
def test_a_bag_of_words_ties_on_swapped_captions(rich, granularity):
    generator = np.random.default_rng(0)
    vocabulary: dict[str, np.ndarray] = {}

    def tower(text):
        bag = sorted(bag_of_words(text).items())
        return sum(n * vocabulary.setdefault(word, generator.standard_normal(16)) for word, n in bag)

    wins = total = 0
    for scene in rich[1][:700]:
        if swapped := scenes.swapped(scene, granularity):
            image = generator.standard_normal(16)
            wins += image @ tower(scenes.caption(scene, granularity)) > image @ tower(swapped)
            total += 1
    assert total > 400
    assert wins == 0  # a tie each time: 50 % if ties count half, 0 % if they do not; chance is 50 %


# (vi) Splits.


def test_fifteen_per_cent_of_the_pairs_are_held_out():
    assert len(HELD_OUT) == 0.15 * len(SHAPES) * len(COLOURS)
    assert max(Counter(shape for shape, _ in HELD_OUT).values()) <= 2
    assert max(Counter(colour for _, colour in HELD_OUT).values()) <= 2
    assert {shape for shape, _ in HELD_OUT} == set(range(12))
    assert {colour for _, colour in HELD_OUT} == set(range(10))


def compositions(latents: Latents):
    """The (shape, colour, texture) triples that occur."""
    live = latents.radius > 0
    return set(
        zip(latents.shape[live].tolist(), latents.colour[live].tolist(), latents.texture[live].tolist(), strict=True)
    )


def test_splits_share_no_scene_and_held_out_pairs_stay_out(world):
    level = world[1][0].level
    splits = [split for split in scenes.SPLITS if split != "style-test" or level in RICH]
    n = number(level)
    by_split = {split: sample(level, split, np.arange(n)) for split in splits}
    hashes = [set(latents.hashes()) for latents in by_split.values()]
    assert sum(map(len, hashes)) == len(set().union(*hashes))
    assert all(len(each) == n for each in hashes)
    for split, latents in by_split.items():
        pairs = {triple[:2] for triple in compositions(latents)}
        assert pairs <= HELD_OUT if split == "comp-test" else not pairs & HELD_OUT
        assert pairs == HELD_OUT if split == "comp-test" else len(pairs) == 102
        assert (latents.style == 3).all() == (split == "style-test")
    assert not compositions(by_split["train"]) & compositions(by_split["comp-test"])


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_image(level):
    images = [
        image.tobytes() for split in scenes.SPLITS[:4] for image in render(sample(level, split, np.arange(400)), 32)
    ]
    assert len(set(images)) == len(images)


def test_the_split_is_told_by_an_invisible_shift():
    """What keeps splits apart, x modulo 5, moves an object by at most 4/1024 of the image, less than half a pixel."""
    for split, residue in zip(scenes.SPLITS[:4], range(4), strict=True):
        latents = sample("L1", split, np.arange(500))
        assert (latents.x[:, 0] % 5 == residue).all()
        assert len(set((latents.x[:, 1][latents.count > 1] % 5).tolist())) == 5


# (vii) Equal captions have equal ids.


@pytest.mark.parametrize("granularity", scenes.GRANULARITIES)
def test_equal_captions_have_equal_ids(world, granularity):
    ids: dict[str, int] = {}
    for scene in world[1]:
        id = scenes.caption_id(scenes.claims(scene, granularity))
        assert ids.setdefault(scenes.caption(scene, granularity, paraphrase=0), id) == id
    level, share = world[1][0].level, 1 - len(set(ids.values())) / len(world[1])
    print(f"{level}: {100 * share:.1f} % of {len(world[1])} captions ({granularity}) say what an earlier one says")


# Balance and appearance.


def chi_square(values, expected):
    """p-value of counts 0, 1, ... of the values against expected shares."""
    from scipy.stats import chisquare

    return chisquare(np.bincount(values, minlength=len(expected)), np.array(expected) * len(values)).pvalue


def test_every_factor_is_balanced(world):
    latents, every = world
    live = latents.radius > 0
    level = scenes.LEVELS[every[0].level]
    allowed = np.array([[(s, c) not in HELD_OUT for c in range(10)] for s in range(12)])
    least, most = level.objects
    shares = {
        "shape": (latents.shape[live], allowed.sum(1) / 102),
        "colour": (latents.colour[live], allowed.sum(0) / 102),
        "count": (latents.count - least, np.full(most - least + 1, 1 / (most - least + 1))),
        "paraphrase": (latents.wording[:, 0], np.full(5, 0.2)),
        "granularity": (latents.wording[:, 1], np.full(5, 0.2)),
    }
    if len(level.radii) > 1:
        shares["size"] = latents.size[live], np.full(3, 1 / 3)
        shares["place"] = latents.place[live], np.full(9, 1 / 9)
        first = latents.size[:, 0] * 12 + latents.shape[:, 0]
        shares["size and shape"] = first, np.tile(allowed.sum(1) / 102, 3) / 3
    if level.rich:
        shares["texture"] = latents.texture[live], np.full(5, 0.2)
        shares["style"] = latents.style, np.full(3, 1 / 3)
        shares["background"] = latents.background, np.full(5, 0.2)
        turning = live & (TURNS[latents.shape] == 7)
        shares["orientation"] = latents.orientation[turning], np.full(8, 1 / 8)
        shares["order"] = latents.order[:, 0], np.full(most, 1 / most)
    p = {name: chi_square(values, expected) for name, (values, expected) in shares.items()}
    assert min(p.values()) > 1e-3, p


def to_lab(rgb):
    """CIE Lab (D65) of 8-bit sRGB [n, 3]."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / (0.95047, 1, 1.08883)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_a_colour_is_nearest_to_its_own_prototype(world):
    latents, _ = world
    live = latents.radius > 0
    lab, own = to_lab(latents.rgb[live]), latents.colour[live]
    distance = np.linalg.norm(lab[:, None] - LAB, axis=-1)
    assert (distance.argmin(1) == own).all()
    assert (lab - LAB[own]).std(0) == pytest.approx(6, abs=0.8)  # the gamut's edge cuts some of the jitter off


def test_a_size_is_what_it_is_called(world):
    latents, _ = world
    if latents.level == "L0":
        return
    radius = [latents.radius[(latents.radius > 0) & (latents.size == k)] / UNIT for k in range(3)]
    means = [each.mean() for each in radius]
    assert np.array(means) / means[0] == pytest.approx([1, 1.5, 2.25], rel=0.01)
    assert all(abs(each / mean - 1).max() < 0.1 for each, mean in zip(radius, means, strict=True))


def test_enough_of_every_object_is_visible(rich):
    """Measured on the pixels: each object drawn alone, and what of it those in front leave."""
    latents = rich[0].take(np.arange(800))
    black = {"style": 0, "background": 0, "background_rgb": 255, "rgb": 0, "count": 1}
    layers = []
    most = latents.shape.shape[1]
    for k in range(most):
        alone = {name: np.roll(array, -k, 1) for name, array in latents.arrays().items() if array.shape[1:] == (most,)}
        flat = {name: np.full_like(getattr(latents, name), value) for name, value in black.items()}
        solid = {"texture": np.where(alone["texture"] == 4, 4, 0), "radius": np.maximum(alone["radius"], 1)}
        image = render(Latents(**{**vars(latents), **alone, **flat, **solid}), 96)[:, 0]
        layers.append((image < 128) & (latents.radius[:, k] > 0)[:, None, None])
    lowest = 1.0
    for k, layer in enumerate(layers):
        in_front = np.logical_or.reduce(layers[k + 1 :]) if k < most - 1 else np.zeros_like(layer)
        drawn = latents.radius[:, k] > 0
        visible = (layer & ~in_front).sum((1, 2))[drawn] / layer.sum((1, 2))[drawn]
        lowest = min(lowest, visible.min())
        assert lowest >= 0.35
        assert abs(visible - latents.visible[drawn, k] / 96).max() < 0.15
    hidden = np.mean(latents.visible[latents.radius > 0] < 96)
    print(
        f"{latents.level}: {100 * hidden:.0f} % of the objects are partly covered; visible of the worst: {lowest:.2f}"
    )
    assert hidden > 0.1
