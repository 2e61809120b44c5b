"""Questions about scenes, in families whose answers are balanced, each with the program that answers it.

A question is asked by (family, predicate, wanted answer): `ask` finds one on the scene, or None where the scene has
none. The wanted answer is drawn before the scene is looked at, so answers are uniform within each predicate, and the
words of a question tell nothing: yes and no come from the same objects in another order, or from values that are drawn
alike whether they are there or not.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlmfast.data.order import BITS, random_int
from vlmfast.data.scenes.captions import CONVERSE
from vlmfast.data.scenes.colours import COLOURS
from vlmfast.data.scenes.latents import APART, HELD_OUT, LEVELS, SIZES, SPLITS, TEXTURES, UNIT, Field, Object, Scene
from vlmfast.data.scenes.programs import Program
from vlmfast.data.scenes.shapes import SHAPES
from vlmfast.errors import DataError

Item = TypeVar("Item")
Said = dict[str, str]  # what is said of an object: attribute -> value

VALUES = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}
YES_NO = ("yes", "no")
# Ways to name an object; of those that fit no other object, one is drawn.
NAMES = (
    ("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour"), ("texture", "shape"),
    ("texture", "colour"), ("place",),
)  # fmt: skip
# Families for which an answer must be wanted before a scene is chosen: few scenes have three things of a size.
SCARCE = ("count", "same")


@dataclass(frozen=True)
class Question:
    """A question, its answer among the candidates, and the program that gives it."""

    family: str
    predicate: str  # what of the family is asked; answers are balanced within it
    text: str
    answer: str
    candidates: tuple[str, ...]
    program: Program


class Draw:
    """A sequence of random choices that depends on its key alone."""

    def __init__(self, *key: int) -> None:
        self.state = random_int(*key)

    def below(self, n: int) -> int:
        """A number 0 .. n - 1."""
        # Knuth's linear congruential generator; its upper half is random enough to choose by, and it is fast.
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) & BITS
        return (self.state >> 32) * n >> 32

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items in another order, each drawn when it is asked for."""
        rest = list(items)
        for left in range(len(rest), 0, -1):
            k = self.below(left)
            yield rest[k]
            rest[k] = rest[left - 1]


@functools.cache
def predicates(level: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """Family -> predicate -> candidate answers, of a level.

    Args:
        level: "L1" or a higher one.

    Raises:
        DataError: there is no such level, or it has no questions.
    """
    if level not in LEVELS or LEVELS[level].objects == (1, 1):
        some = ", ".join(name for name, facts in LEVELS.items() if facts.objects != (1, 1))
        raise DataError(f"scenes: levels with questions are {some}; got {level!r}")
    rich, most = LEVELS[level].rich, LEVELS[level].objects[1]
    values = {name: values for name, values in VALUES.items() if rich or name != "texture"}
    numbers = tuple(str(n) for n in range({2: 3, 4: 4}.get(most, 5)))
    # Not three of a colour or a shape: few scenes have them, and none of comp-test.
    counted = ("size", "texture") if rich else tuple(values)
    described = ("shape", "colour", "colour shape", "size shape", *(("texture shape",) if rich else ()))
    compared = ("bigger", "smaller", *(("more", "fewer") if rich else ()))
    return {
        "exist": dict.fromkeys(described, YES_NO),
        "count": dict.fromkeys(counted, numbers),
        **{f"query-{name}": {name: VALUES[name]} for name in values},
        "compare": dict.fromkeys(compared, YES_NO),
        "relate": dict.fromkeys(CONVERSE, YES_NO),
        "same": dict.fromkeys((f"{word} {name}" for name in values for word in ("same", "different")), YES_NO),
        "logic": dict.fromkeys(("and", "or", "not"), YES_NO),
        "two-hop": values,
    }


def prior(family: str, level: str = "L2") -> float:
    """The accuracy that the best constant answer to each predicate of a family has: what no image is worth.

    Args:
        family: a key of `predicates`.
        level: "L1" or a higher one.

    Raises:
        DataError: there is no such family or level.
    """
    known = predicates(level)
    if family not in known:
        raise DataError(f"scenes: families at {level} are {', '.join(known)}; got {family!r}")
    return sum(1 / len(candidates) for candidates in known[family].values()) / len(known[family])


def questions(scene: Scene) -> list[Question]:
    """One question of each family that the scene has one of; what is asked depends on the scene's number alone.

    Families that need a scarce scene (SCARCE) come with the answers that the scene has: only `tasks.dataset`, which
    looks for the scene, balances those.

    Args:
        scene: of L1 or a higher level.

    Raises:
        DataError: the level has no questions.
    """
    found = []
    for number, (family, known) in enumerate(predicates(scene.level).items()):
        draw = Draw(*key(scene.seed, scene.level, scene.split), scene.index, number)
        tries = ((name, answer) for name in draw.shuffled(known) for answer in draw.shuffled(known[name]))
        asked = (ask(scene, family, name, answer, draw) for name, answer in tries)
        if question := next(filter(None, asked), None):
            found.append(question)
    return found


def key(seed: int, level: str, split: str) -> tuple[int, ...]:
    """What random choices about questions of a split depend on, besides the item's own number."""
    return seed, list(LEVELS).index(level), SPLITS.index(split), Field.QUESTION


def ask(scene: Scene, family: str, predicate: str, wanted: str, draw: Draw) -> Question | None:
    """A question with the wanted answer, or None if the scene has none.

    Whether there is one does not depend on the wanted answer, except in the families SCARCE. Where a value is asked
    (query-*, two-hop) the wanted answer is not looked at: the values of objects are uniform by themselves, but for
    held-out pairs, and some questions are dropped by lot to make up for those.

    Args:
        scene: of L1 or a higher level.
        family: a key of `predicates`.
        predicate: a key of the family.
        wanted: one of the predicate's candidates.
        draw: where choices come from.
    """
    made = _ASK[family](scene, predicate, wanted, draw)
    if made is None:
        return None
    text, program, answer = made
    return Question(family, predicate, text, answer, predicates(scene.level)[family][predicate], program)


def promising(things: Mapping[str, np.ndarray], family: str, predicate: str, wanted: str) -> np.ndarray:
    """[n] bool: scenes in which `ask` may find such a question; in the others it finds none.

    Args:
        things: of n scenes, as `attributes` gives them.
        family: as `ask`.
        predicate: as `ask`.
        wanted: as `ask`.
    """
    count = things["count"]
    if family in SCARCE:
        kind = predicate.split()[-1]
        values = things[kind]
        live = np.arange(values.shape[1]) < count[:, None]
        of_each = ((values[..., None] == np.arange(len(VALUES[kind]))) & live[..., None]).sum(1)  # [n, values]
        if family == "count":
            return (of_each == int(wanted)).any(1)
        alike = predicate.startswith("same") == (wanted == "yes")
        return (of_each >= 2).any(1) if alike else (of_each > 0).sum(1) >= 2
    return count > int(family in ("compare", "relate", "two-hop") or predicate in ("and", "or"))


# What a family's function gives: text, program and answer.
Made = tuple[str, Program, str] | None


def _exist(scene: Scene, predicate: str, wanted: str, draw: Draw) -> Made:
    kinds = predicate.split()
    said = _present(scene, kinds, draw) if wanted == "yes" else _absent(scene, kinds, draw)
    return f"Is there {a_noun(said)}?", ("exist", _set(said)), wanted


def _count(scene: Scene, kind: str, wanted: str, draw: Draw) -> Made:
    counts = _counts(scene, kind)
    values = [value for value in VALUES[kind] if counts[value] == int(wanted)]
    if not values:
        return None
    said = {kind: draw.one(values)}
    return f"How many {noun(said, many=True)} are there?", ("count", _set(said)), wanted


def _query(scene: Scene, kind: str, wanted: str, draw: Draw) -> Made:
    for thing in draw.shuffled(scene.objects):
        answer, said = getattr(thing, kind), _name(scene, thing, draw, without=(kind,))
        if said and _kept(scene, kind, answer, draw):
            return _asked(kind, f"the {noun(said)}"), ("query", kind, _set(said)), answer
    return None


def _compare(scene: Scene, which: str, wanted: str, draw: Draw) -> Made:
    if which in ("more", "fewer"):
        for kind in draw.shuffled(VALUES):
            counts = _counts(scene, kind)
            unlike = [(a, b) for a in VALUES[kind] for b in VALUES[kind] if counts[a] > counts[b] > 0]
            if unlike:
                more, fewer = ({kind: value} for value in draw.one(unlike))
                a, b = (more, fewer) if (which == "more") == (wanted == "yes") else (fewer, more)
                text = f"Are there {which} {noun(a, many=True)} than {noun(b, many=True)}?"
                return text, (which, _set(a), _set(b)), wanted
        return None
    rank = SIZES.index
    for big, small in _pairs(scene, draw, lambda a, b: rank(a.size or "") > rank(b.size or "")):
        things = (big, small) if (which == "bigger") == (wanted == "yes") else (small, big)
        names = _two_names(scene, things, draw, without=("size", "place"))
        if names:
            a, b = names
            return f"Is the {noun(a)} {which} than the {noun(b)}?", (which, _set(a), _set(b)), wanted
    return None


def _relate(scene: Scene, relation: str, wanted: str, draw: Draw) -> Made:
    for pair in _pairs(scene, draw, lambda a, b: _offset(a, relation, b) >= APART / UNIT):
        things = pair if wanted == "yes" else pair[::-1]
        names = _two_names(scene, things, draw, without=("place",))
        if names:
            a, b = names
            text = f"Is the {noun(a)} {in_words(relation)} the {noun(b)}?"
            return text, ("relates", relation, _set(a), _set(b)), wanted
    return None


def _same(scene: Scene, predicate: str, wanted: str, draw: Draw) -> Made:
    which, kind = predicate.split()
    alike = (which == "same") == (wanted == "yes")
    for things in _pairs(scene, draw, lambda a, b: (getattr(a, kind) == getattr(b, kind)) == alike):
        names = _two_names(scene, things, draw, without=(kind, "place"))
        if names:
            a, b = names
            how = f"the same {kind} as" if which == "same" else f"a different {kind} from"
            return f"Does the {noun(a)} have {how} the {noun(b)}?", (which, kind, _set(a), _set(b)), wanted
    return None


def _logic(scene: Scene, word: str, wanted: str, draw: Draw) -> Made:
    kind = draw.one(("shape", "colour"))
    here = list(draw.shuffled(sorted({getattr(thing, kind) for thing in scene.objects})))
    gone = list(draw.shuffled(value for value in VALUES[kind] if value not in here))
    if word == "not":
        said = {kind: (gone if wanted == "yes" else here)[0]}
        return f"Is there no {noun(said)}?", ("not", ("exist", _set(said))), wanted
    if min(len(here), len(gone)) < 2:
        return None
    one, other = [here[0], here[1]], [gone[0], gone[1]]
    mixed = [here[0], gone[0]]
    # "And" is true of both, "or" false of neither; the other three cases are equally likely.
    odd, even = (one, other) if word == "and" else (other, one)
    values = odd if (word == "and") == (wanted == "yes") else draw.one((mixed, mixed[::-1], even))
    a, b = ({kind: value} for value in values)
    text = f"Is there {a_noun(a)} {word} {a_noun(b)}?"
    return text, (word, ("exist", _set(a)), ("exist", _set(b))), wanted


def _two_hop(scene: Scene, kind: str, wanted: str, draw: Draw) -> Made:
    for anchor, relation in draw.shuffled(itertools.product(scene.objects, CONVERSE)):
        beside = [t for t in scene.objects if t.id != anchor.id and _offset(t, relation, anchor) > -APART / UNIT]
        said = _name(scene, anchor, draw, without=(kind, "place"))
        if not (said and beside):
            continue
        # "The thing" if it is the only one on that side; else by a word that fits others, but none on that side.
        target = draw.one(beside)
        words = [{}, *({name: getattr(target, name)} for name in draw.shuffled(VALUES) if name != kind)]
        for word in words:
            if _fit(beside, word) != [target] or len(_fit(scene.objects, word)) < 2:
                continue
            if _offset(target, relation, anchor) < APART / UNIT or not _kept(scene, kind, getattr(target, kind), draw):
                break
            what = f"the {noun(word)} {in_words(relation)} the {noun(said)}"
            program = ("beside", relation, _set(said))
            return _asked(kind, what), ("query", kind, _set(word, program)), getattr(target, kind)
    return None


_ASK: dict[str, Callable[[Scene, str, str, Draw], Made]] = {
    "exist": _exist,
    "count": _count,
    **{f"query-{kind}": _query for kind in VALUES},
    "compare": _compare,
    "relate": _relate,
    "same": _same,
    "logic": _logic,
    "two-hop": _two_hop,
}


# Objects and what is said of them.


def _fit(things: Iterable[Object], said: Said) -> list[Object]:
    return [thing for thing in things if all(getattr(thing, name) == value for name, value in said.items())]


def _counts(scene: Scene, kind: str) -> Counter[str]:
    return Counter(getattr(thing, kind) for thing in scene.objects)


def _offset(a: Object, relation: str, b: Object) -> float:
    """How far `a` lies in the direction of the relation from `b`."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


def _pairs(scene: Scene, draw: Draw, good: Callable[[Object, Object], bool]) -> Iterator[tuple[Object, Object]]:
    """The ordered pairs of objects that are good, shuffled."""
    return ((a, b) for a, b in draw.shuffled(itertools.permutations(scene.objects, 2)) if good(a, b))


def _name(scene: Scene, thing: Object, draw: Draw, without: Sequence[str]) -> Said | None:
    """A way to name the object that fits no other and says nothing of `without`."""
    for kinds in draw.shuffled(NAMES):
        said = {kind: getattr(thing, kind) for kind in kinds}
        if not set(kinds) & set(without) and None not in said.values() and len(_fit(scene.objects, said)) == 1:
            return said
    return None


def _two_names(scene: Scene, things: Sequence[Object], draw: Draw, without: Sequence[str]) -> list[Said] | None:
    names = [name for thing in things if (name := _name(scene, thing, draw, without))]
    return names if len(names) == 2 else None


def _present(scene: Scene, kinds: Sequence[str], draw: Draw) -> Said:
    thing = draw.one(scene.objects)
    return {kind: getattr(thing, kind) for kind in kinds}


def _absent(scene: Scene, kinds: Sequence[str], draw: Draw) -> Said:
    """What fits no object: values of several objects put together if there are such, else other values."""
    known = [sorted({getattr(thing, kind) for thing in scene.objects}) for kind in kinds]
    for source in (known, [VALUES[kind] for kind in kinds]):
        for values in draw.shuffled(itertools.product(*source)):
            said = dict(zip(kinds, values, strict=True))
            if not _fit(scene.objects, said) and _belongs(scene, said):
                return said
    raise DataError(f"scenes: scene {scene.index} of {scene.level}/{scene.split} has every {' and '.join(kinds)}")


def _belongs(scene: Scene, said: Said) -> bool:
    """Whether a (shape, colour) pair occurs in the scene's split."""
    if not {"shape", "colour"} <= said.keys():
        return True
    pair = SHAPES.index(said["shape"]), COLOURS.index(said["colour"])
    return (pair in HELD_OUT) == (scene.split == "comp-test")


def _shares(held_out: bool) -> dict[str, Counter[str]]:
    """How many (shape, colour) pairs each value has."""
    pairs = [pair for pair in itertools.product(range(12), range(10)) if (pair in HELD_OUT) == held_out]
    return {"shape": Counter(SHAPES[s] for s, _ in pairs), "colour": Counter(COLOURS[c] for _, c in pairs)}


_SHARES = (_shares(held_out=False), _shares(held_out=True))


def _kept(scene: Scene, kind: str, value: str, draw: Draw) -> bool:
    """By lot, so that every value of shape and colour is kept equally often though it occurs in more or fewer pairs."""
    shares = _SHARES[scene.split == "comp-test"].get(kind)
    return shares is None or draw.below(shares[value]) < min(shares.values())


def _set(said: Mapping[str, str], inner: Program = ("all",)) -> Program:
    for name, value in said.items():
        inner = ("filter", name, value, inner)
    return inner


# Words.


def noun(said: Mapping[str, str], many: bool = False) -> str:
    """What is said of an object as a noun with adjectives and place, without article.

    Args:
        said: attribute -> value; without a shape it is a thing.
        many: the plural.
    """
    shape = said.get("shape", "thing")
    words = [said[kind] for kind in ("size", "texture", "colour") if kind in said]
    words.append(shape + ("es" if shape == "cross" else "s") * many)
    if place := said.get("place"):
        words.append("in the center" if place == "center" else f"at the {place}")
    return " ".join(words)


def a_noun(said: Mapping[str, str]) -> str:
    """`noun` of what is `said` with the indefinite article."""
    return f"{article(noun(said))} {noun(said)}"


def article(words: str) -> str:
    """The article that the words take: an before a vowel, else a."""
    return "an" if words[0] in "aeiou" else "a"


def in_words(relation: str) -> str:
    """A `relation` as it stands in a sentence: to the left of, above."""
    return f"to the {relation}" if relation.endswith("of") else relation


def _asked(kind: str, what: str) -> str:
    return f"What {kind} is {what}?" if kind != "texture" else f"What texture does {what} have?"
