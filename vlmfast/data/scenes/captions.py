"""Captions of scenes from a grammar: five granularities, five paraphrases, and negatives with the same words.

A caption words a list of claims. Captions that make the same claims have the same id, however they are worded; and a
claim can be checked against a scene.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from vlmfast.data.scenes.colours import COLOURS
from vlmfast.data.scenes.latents import HELD_OUT, LEVELS, PLACES, Object, Scene
from vlmfast.data.scenes.shapes import SHAPES
from vlmfast.errors import DataError

GRANULARITIES = ("word", "phrase", "sentence", "multi-sentence", "paragraph")
ORDERS = ("own", "reading")
PARAPHRASES = 5
ALL_ORDERS = 4  # of so many objects `references` gives the captions in every order
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Paraphrase p takes word number p; paraphrase 0 is canonical. What is not here has one word. No word means two things.
SYNONYMS = {
    "small": ("small", "little", "small", "tiny", "small"),
    "medium": ("medium", "medium", "medium-sized", "medium", "medium-sized"),
    "large": ("large", "big", "large", "huge", "large"),
    "checkered": ("checkered", "checkered", "chequered", "checkered", "chequered"),
    "hollow": ("hollow", "outlined", "hollow", "outlined", "hollow"),
    "gray": ("gray", "gray", "grey", "grey", "gray"),
    "purple": ("purple", "purple", "purple", "violet", "purple"),
    "circle": ("circle", "circle", "disc", "circle", "circle"),
    "cross": ("cross", "cross", "cross", "plus", "cross"),
    "ring": ("ring", "ring", "ring", "ring", "hoop"),
    "diamond": ("diamond", "rhombus", "diamond", "diamond", "diamond"),
    "crescent": ("crescent", "moon", "crescent", "crescent", "moon"),
    "car": ("car", "car", "automobile", "car", "car"),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = (
    "there {be} {n}",
    "the picture has {n}",
    "{n} {be} in the picture",
    "you can see {n}",
    "this is a picture of {n}",
)
PHRASES = ("{}", "a picture of {}", "an image of {}", "{} in a picture", "a view of {}")


@dataclass(frozen=True)
class Mention:
    """What is said of one object; None where nothing is."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Object) -> bool:
        """Whether all that is said is true of the object."""
        return all(said in (None, getattr(thing, name)) for name, said in vars(self).items())


@dataclass(frozen=True)
class Claim:
    """One statement: how many objects there are, or that there is one, at a place, or in a relation to another."""

    mention: Mention | None = None  # None: there are `count` objects and no more
    count: int = 0
    place: str | None = None
    relation: str | None = None  # a key of CONVERSE
    other: Mention | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true of the scene."""
        if self.mention is None:
            return len(scene.objects) == self.count
        things = [thing for thing in scene.objects if self.mention.fits(thing) and self.place in (None, thing.place)]
        if self.relation is None or self.other is None:
            return bool(things)
        others = [thing for thing in scene.objects if self.other.fits(thing)]
        return any(relates(a, self.relation, b) for a, b in itertools.product(things, others))

    def canonical(self) -> Claim:
        """The claim itself, or its converse if that is worded with left of or above."""
        if self.relation in ("right of", "below"):
            return replace(self, mention=self.other, relation=CONVERSE[self.relation], other=self.mention)
        return self


def relates(a: Object, relation: str, b: Object) -> bool:
    """Whether the centre of `a` is left of, right of, above or below that of `b`, as `relation` says."""
    right, down = b.x - a.x, b.y - a.y
    return {"left of": right, "right of": -right, "above": down, "below": -down}[relation] > 0


def relation_of(a: Object, b: Object) -> str:
    """The relation of `a` to `b` along the axis on which they are further apart, at least 0.11 of the image."""
    right, down = b.x - a.x, b.y - a.y
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def claims(scene: Scene, granularity: str) -> list[Claim]:
    """What the caption of a scene says, in its order.

    A word says one attribute, a phrase one object. A sentence says at L0 the object, at L1 all objects with their
    places, from L2 on two objects and their relation. A multi-sentence says the count, then places at L1, relations
    from L2 on. A paragraph says all of it.

    Args:
        scene: the scene.
        granularity: one of GRANULARITIES.

    Raises:
        DataError: there is no such granularity.
    """
    things = [scene.objects[k] for k in scene.order]
    full = [Mention(t.size, t.texture, t.colour, t.shape) for t in things]
    brief = [Mention(colour=t.colour, shape=t.shape) for t in things]
    count = Claim(count=len(things))
    places = [Claim(mention, place=t.place) for mention, t in zip(full, things, strict=True)]

    def relations(mentions: list[Mention]) -> list[Claim]:
        steps = zip(itertools.pairwise(mentions), itertools.pairwise(things), strict=True)
        return [Claim(one, relation=relation_of(a, b), other=two) for (one, two), (a, b) in steps]

    if granularity == "word":
        return [Claim(Mention(shape=things[0].shape) if scene.wording[2] % 2 else Mention(colour=things[0].colour))]
    if granularity == "phrase":
        return [Claim(full[0])]
    if granularity == "sentence":
        return relations(full)[:1] if LEVELS[scene.level].rich else places
    if granularity == "multi-sentence":
        return [count, *(relations(brief) if LEVELS[scene.level].rich else places)]
    if granularity == "paragraph":
        if scene.level == "L0":
            return [count, Claim(Mention(shape=things[0].shape)), Claim(Mention(colour=things[0].colour))]
        return [count, *places, *relations(brief)]
    raise DataError(f"scenes: granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}")


def caption(scene: Scene, granularity: str = "sentence", paraphrase: int | None = None, order: str = "own") -> str:
    """The caption of a scene.

    Args:
        scene: the scene.
        granularity: one of GRANULARITIES; see `claims`.
        paraphrase: 0 .. 4; default: the scene's own.
        order: of the objects: "own", the scene's own, or "reading": by their places, row by row, and a word is the
            first one's colour. With a paraphrase, "reading" leaves one right caption for an image.

    Raises:
        DataError: there is no such granularity, paraphrase or order.
    """
    if order not in ORDERS:
        raise DataError(f"scenes: order must be one of {', '.join(ORDERS)}; got {order!r}")
    scene = in_reading_order(scene) if order == "reading" else scene
    p = scene.wording[0] if paraphrase is None else paraphrase
    if not 0 <= p < PARAPHRASES:
        raise DataError(f"scenes: paraphrase must be 0 .. {PARAPHRASES - 1}; got {paraphrase}")
    said = claims(scene, granularity)
    if granularity == "word":
        return _words(said[0].mention, p)
    if granularity == "phrase":
        return PHRASES[p].format(_a(said[0].mention, p))
    if granularity == "sentence":
        return _sentence(" and ".join(_clause(claim, p, k) for k, claim in enumerate(said)))
    return " ".join(_sentence(_statement(claim, p)) for claim in said)


def references(scene: Scene, granularity: str = "sentence") -> list[str]:
    """Every right caption of a scene, the canonical one (paraphrase 0 in reading order) first, each once.

    All paraphrases, and all choices and orders of the objects that the granularity leaves free: any object's colour or
    shape for a word, any object for a phrase, any two for a sentence from L2 on. Of more than ALL_ORDERS objects that
    must all be named, the reading order alone: nine have 362 880 orders.

    Args:
        scene: the scene.
        granularity: one of GRANULARITIES.

    Raises:
        DataError: there is no such granularity.
    """
    canonical = in_reading_order(scene)
    count, own = len(scene.objects), canonical.wording
    named = {"word": 1, "phrase": 1, "sentence": min(2, count)}.get(granularity, count)
    orders = itertools.permutations(canonical.order, named) if named <= ALL_ORDERS else [canonical.order]
    wordings = [(*own[:2], 0), (*own[:2], 1)] if granularity == "word" else [own]
    texts = (
        caption(replace(scene, order=order, wording=wording), granularity, p)
        for order, wording, p in itertools.product(orders, wordings, range(PARAPHRASES))
    )
    return list(dict.fromkeys(texts))


def caption_id(said: Sequence[Claim]) -> int:
    """A 63-bit number, equal for captions that make the same claims `said`: positives of each other."""
    canonical = sorted(repr(astuple(claim.canonical())) for claim in said)
    return int.from_bytes(hashlib.blake2b("\n".join(canonical).encode(), digest_size=8).digest(), "little") >> 1


def swapped(scene: Scene, granularity: str = "sentence", paraphrase: int | None = None) -> str | None:
    """A caption with the same words as the scene's, and false of it; None if there is none, as with one object.

    Two objects exchange their colour, shape, size, texture, or everything but their place. Which, is the scene's own
    choice among those that make a claim false and keep held-out pairs on their side.

    Args:
        scene: the scene.
        granularity: as `caption`.
        paraphrase: as `caption`.

    Raises:
        DataError: as `caption`.
    """
    if len(scene.objects) < 2:
        return None
    candidates = []
    for names in (("colour",), ("shape",), ("size",), ("texture",), ("size", "texture", "colour", "shape")):
        first, second = (scene.objects[scene.order[k]] for k in (0, 1 if granularity == "sentence" else -1))
        things = list(scene.objects)
        things[first.id] = replace(first, **{name: getattr(second, name) for name in names})
        things[second.id] = replace(second, **{name: getattr(first, name) for name in names})
        if things == list(scene.objects) or any(_held_out(things[t.id]) != _held_out(t) for t in (first, second)):
            continue
        other = replace(scene, objects=tuple(things))
        if not all(claim.holds(scene) for claim in claims(other, granularity)):
            candidates.append(other)
    if not candidates:
        return None
    return caption(candidates[scene.wording[2] % len(candidates)], granularity, paraphrase)


def in_reading_order(scene: Scene) -> Scene:
    """The scene with its objects named place by place, row by row, and a word naming the colour."""
    if LEVELS[scene.level].objects == (1, 1):
        return replace(scene, wording=(*scene.wording[:2], 0))
    order = sorted(scene.order, key=lambda k: PLACES.index(scene.objects[k].place or ""))
    return replace(scene, order=tuple(order), wording=(*scene.wording[:2], 0))


def _held_out(thing: Object) -> bool:
    return (SHAPES.index(thing.shape), COLOURS.index(thing.colour)) in HELD_OUT


def _words(mention: Mention | None, p: int) -> str:
    """The attributes said, in the order of English adjectives."""
    return " ".join(SYNONYMS.get(said, (said,) * PARAPHRASES)[p] for said in astuple(mention or Mention()) if said)


def _a(mention: Mention | None, p: int) -> str:
    words = _words(mention, p)
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _where(place: str, p: int) -> str:
    if place == "center":
        return ("in the center", "in the middle")[p % 2]
    if " " in place:
        return (f"at the {place}", f"in the {place} corner")[p % 2]
    return (f"at the {place}", f"on the {place} side")[p % 2]


def _relation(claim: Claim, p: int) -> tuple[Mention | None, str, Mention | None]:
    """The claim as (mention, words, other), turned around in paraphrases 3 and 4."""
    mention, relation, other = claim.mention, claim.relation or "", claim.other
    if p >= 3:
        mention, relation, other = other, CONVERSE[relation], mention
    return mention, f"to the {relation}" if relation.endswith("of") else relation, other


def _clause(claim: Claim, p: int, k: int) -> str:
    """The claim as clause k of a sentence, without capital and stop."""
    if claim.relation:
        mention, relation, other = _relation(claim, p)
        what, where = _a(mention, p), f"{relation} {_a(other, p)}"
        return (f"there is {what} {where}", f"{what} is {where}", f"the picture shows {what} {where}",
                f"you can see {what} {where}", f"{what} is {where}")[p]  # fmt: skip
    what = _a(claim.mention, p)
    if claim.place is None:
        return (f"there is {what}", f"this is {what}", f"the picture shows {what}",
                f"you can see {what}", f"{what} is in the picture")[p]  # fmt: skip
    where = _where(claim.place, p)
    opening = ("there is ", "", "the picture shows ", "you can see ", "")[p] if k == 0 else ""
    return (
        opening
        + (f"{what} {where}", f"{where} there is {what}", f"{what} {where}", f"{what} {where}", f"{what} is {where}")[p]
    )


def _statement(claim: Claim, p: int) -> str:
    """The claim as a sentence of a longer text."""
    if claim.mention is None:
        number = f"{NUMBERS[claim.count]} {'shape' if claim.count == 1 else 'shapes'}"
        return COUNTS[p].format(n=number, be="is" if claim.count == 1 else "are")
    if claim.relation:
        mention, relation, other = _relation(claim, p)
        return f"the {_words(mention, p)} is {relation} the {_words(other, p)}"
    if claim.place is None:  # the only object
        return f"it is {_a(claim.mention, p) if claim.mention.shape else _words(claim.mention, p)}"
    what, where = _a(claim.mention, p), _where(claim.place, p)
    return f"{where} there is {what}" if p in (1, 3) else f"{what} is {where}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
