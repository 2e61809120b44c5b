"""Levels, vocabulary, and the latents of a scene: what is where. Images and captions are views of them.

Sample i of a split is a function of (seed, level, split, i) alone: every draw is a counter-based hash of those and of
the field's number, so it does not depend on workers, order or count. Latents are integers, made by integer arithmetic
and by float64 + − × ÷, the same on every machine; lengths are in 1024ths of the image.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from vlmfast.data.order import random_bits
from vlmfast.data.scenes import colours
from vlmfast.data.scenes.colours import COLOURS
from vlmfast.data.scenes.shapes import FRAMES, GRID, POINTS, SHAPES, TURNS, covered
from vlmfast.errors import DataError

SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "dotted", "checkered", "hollow")
STYLES = ("flat", "textured", "photo", "sketch")
BACKGROUNDS = ("solid", "gradient", "noise", "grid", "clutter")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

UNIT = 1024  # lengths are in 1024ths of the image's side
APART = 123  # the least distance of two centres, along x or along y: their relation is plain to see
MARGIN = 20  # how far a centre keeps from the lines between the 3 x 3 places
VISIBLE = 0.42  # the least part of an object that is not covered, by sample points; the true part is then above 0.35

SPLITS = ("train", "val", "test", "comp-test", "style-test")
SPLIT_SIZES = {"train": 100_000, "val": 5_000, "test": 5_000, "comp-test": 5_000, "style-test": 5_000}
MAX_INDEX = 2**31

# Fifteen per cent of the 120 (shape, colour) pairs, in every texture, occur in comp-test and nowhere else.
HELD_OUT = frozenset((n % 12, (7 * n + 3) % 10) for n in range(18))
_PAIRS = np.array(list(itertools.product(range(len(SHAPES)), range(len(COLOURS)))))
_IS_HELD_OUT = np.array([tuple(pair) in HELD_OUT for pair in _PAIRS.tolist()])

# Who keeps company at L3-cooc: of a group two come together, 6 pairs in all; the other six shapes are common.
GROUPS = (("star", "heart", "crescent"), ("ring", "arrow", "car"))
_GROUPS = np.array([[SHAPES.index(name) for name in group] for group in GROUPS])
_COMMON = np.array([s for s in range(len(SHAPES)) if s not in _GROUPS])
GROUP_SHARE = 0.06  # of the scenes, for each group, before those with held-out pairs are drawn again


@dataclass(frozen=True)
class Level:
    """How hard a world is.

    Args:
        image_size: default side of the image, pixels.
        objects: the least and the greatest number of objects.
        radii: radius of each size, in 1024ths of the image; varied by ± 8 % where there are several.
        overlap: whether objects may cover each other.
        rich: whether there are textures, orientations, styles and backgrounds.
        distractors: whether each object has another of its shape or colour, as far as held-out pairs allow.
        company: whether a scene has three shapes, of which some come together (GROUPS).
    """

    image_size: int
    objects: tuple[int, int]
    radii: tuple[int, ...]
    overlap: bool
    rich: bool
    distractors: bool = False
    company: bool = False


LEVELS = {
    "L0": Level(32, (1, 1), (307,), overlap=False, rich=False),
    "L1": Level(64, (1, 2), (82, 123, 184), overlap=False, rich=False),
    "L2": Level(96, (2, 4), (102, 153, 230), overlap=True, rich=True),
    "L3": Level(128, (3, 9), (92, 138, 207), overlap=True, rich=True, distractors=True),
    "L3-cooc": Level(128, (3, 9), (92, 138, 207), overlap=True, rich=True, distractors=True, company=True),
}


@dataclass(frozen=True)
class Object:
    """One object. Lengths are fractions of the image's side, from its top left corner."""

    id: int  # its layer: a higher one lies in front
    shape: str
    colour: str
    size: str | None  # None at L0, where all are alike
    texture: str | None  # None below L2, where all are solid
    orientation: int  # eighths of a turn, counter-clockwise
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    visible_frac: float
    place: str | None  # which ninth of the image; None at L0


@dataclass(frozen=True)
class Scene:
    """One scene: everything that its image and its captions show."""

    level: str
    split: str
    seed: int
    index: int
    style: str
    background: str
    objects: tuple[Object, ...]
    order: tuple[int, ...]  # the order in which captions name the objects
    wording: tuple[int, ...]  # paraphrase 0 .. 4, granularity 0 .. 4, and a number for further choices


@dataclass(frozen=True)
class Latents:
    """n scenes as arrays, K the level's greatest number of objects; entries of absent objects are 0."""

    level: str
    split: str
    seed: int
    index: np.ndarray  # [n] int64, as are all below
    count: np.ndarray  # [n]
    style: np.ndarray  # [n]
    background: np.ndarray  # [n]
    background_rgb: np.ndarray  # [n, 2, 3] two colours, 0 .. 255
    noise: np.ndarray  # [n] seed of the image's noise, 0 .. 2**32 - 1
    shape: np.ndarray  # [n, K]
    colour: np.ndarray  # [n, K]
    size: np.ndarray  # [n, K]
    texture: np.ndarray  # [n, K]
    orientation: np.ndarray  # [n, K] eighths of a turn
    place: np.ndarray  # [n, K] which ninth
    x: np.ndarray  # [n, K] 1024ths of the image, to the right
    y: np.ndarray  # [n, K] 1024ths of the image, down
    radius: np.ndarray  # [n, K] 1024ths of the image
    rgb: np.ndarray  # [n, K, 3] 0 .. 255
    visible: np.ndarray  # [n, K] visible part of the object, in 96ths
    order: np.ndarray  # [n, K] permutation; captions name the objects in this order
    wording: np.ndarray  # [n, 3] paraphrase 0 .. 4, granularity 0 .. 4, and 16 bits for further choices

    def __len__(self) -> int:
        return len(self.index)

    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> array, in the order above."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("level", "split", "seed")}

    def take(self, rows: np.ndarray) -> Latents:
        """The scenes of the given rows."""
        return replace(self, **{name: array[rows] for name, array in self.arrays().items()})

    def join(self, *others: Latents) -> Latents:
        """These scenes and those of the others, of one split."""
        every = (self, *others)
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(each, name) for each in every]) for name in self.arrays()
        }
        return replace(self, **arrays)

    def hashes(self) -> list[bytes]:
        """16 bytes for each scene, equal only for scenes that look alike: index, order and wording do not count."""
        seen = [array for name, array in self.arrays().items() if name not in ("index", "order", "wording")]
        rows = np.concatenate([array.reshape(len(self), -1) for array in seen], 1)
        return [hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16).digest() for row in rows]

    def scene(self, row: int) -> Scene:
        """The scene of a row."""
        return self._scene({name: array[row].tolist() for name, array in self.arrays().items()})

    def scenes(self) -> list[Scene]:
        """The scenes of all rows, faster than one by one."""
        columns = {name: array.tolist() for name, array in self.arrays().items()}
        return [self._scene({name: column[row] for name, column in columns.items()}) for row in range(len(self))]

    def _scene(self, value: dict[str, Any]) -> Scene:
        level = LEVELS[self.level]
        objects = tuple(
            Object(
                id=k,
                shape=SHAPES[value["shape"][k]],
                colour=COLOURS[value["colour"][k]],
                size=SIZES[value["size"][k]] if len(level.radii) > 1 else None,
                texture=TEXTURES[value["texture"][k]] if level.rich else None,
                orientation=value["orientation"][k],
                x=value["x"][k] / UNIT,
                y=value["y"][k] / UNIT,
                radius=value["radius"][k] / UNIT,
                rgb=tuple(value["rgb"][k]),
                visible_frac=value["visible"][k] / POINTS,
                place=PLACES[value["place"][k]] if len(level.radii) > 1 else None,
            )
            for k in range(value["count"])
        )
        return Scene(
            level=self.level,
            split=self.split,
            seed=self.seed,
            index=value["index"],
            style=STYLES[value["style"]],
            background=BACKGROUNDS[value["background"]],
            objects=objects,
            order=tuple(k for k in value["order"] if k < value["count"]),
            wording=tuple(value["wording"]),
        )


class Field:
    """The number of each field in the hash. Numbers are never reused: a new field gets a new one."""

    SCENE, BACKGROUND, PAIR, OBJECT, PLACE, POSITION, JITTER, ORDER, WORDING, QUESTION, COMPANY, POPE, INSTRUCT = range(
        13
    )


class _Draws:
    """Random bits of the scenes `index`; a rejected draw is drawn again with another `attempt`."""

    def __init__(self, seed: int, level: str, split: str, index: np.ndarray) -> None:
        self.key = (seed, list(LEVELS).index(level), SPLITS.index(split))
        self.index = index.astype(np.uint64)[:, None]

    def bits(self, field: int, n: int, attempt: int = 0, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """[rows, n] uint64."""
        return random_bits(*self.key, field, attempt, self.index[rows], np.arange(n))


def below(bits: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """int64 numbers 0 .. n - 1 from random bits, each equally likely to within n / 2**32."""
    return ((bits >> np.uint64(32)).astype(np.int64) * n) >> 32


def check(level: str, split: str) -> Level:
    """The level's facts.

    Raises:
        DataError: there is no such level or split, the level has one style and so no style-test, or it has company and
            so no comp-test.
    """
    if level not in LEVELS:
        raise DataError(f"scenes: level must be one of {', '.join(LEVELS)}; got {level!r}")
    if split not in SPLITS:
        raise DataError(f"scenes: split must be one of {', '.join(SPLITS)}; got {split!r}")
    if split == "style-test" and not LEVELS[level].rich:
        rich = ", ".join(name for name, facts in LEVELS.items() if facts.rich)
        raise DataError(f"scenes: level {level} has one style, so no split 'style-test'; levels that have: {rich}")
    if split == "comp-test" and LEVELS[level].company:
        raise DataError(f"scenes: level {level} has no split 'comp-test': held-out pairs are too few to keep company")
    return LEVELS[level]


def sample(level: str, split: str, index: Sequence[int] | np.ndarray, seed: int = 0) -> Latents:
    """The latents of the samples `index`.

    Args:
        level: a key of LEVELS.
        split: "train", "val", "test", "comp-test" (held-out (shape, colour) pairs), "style-test" (held-out style).
        index: [n] numbers 0 .. 2**31 - 1, in any order.
        seed: which world.

    Returns:
        Latents of n scenes; row k is the scene index[k] whatever the other rows are.

    Raises:
        DataError: there is no such level or split, or an index is out of range.
    """
    facts = check(level, split)
    draws = _Draws(seed, level, split, _index(index))
    n, rich, sized = len(draws.index), int(facts.rich), len(facts.radii) > 1
    things = attributes(level, split, index, seed)
    count, shape, colour, size, texture = (things[name] for name in ("count", "shape", "colour", "size", "texture"))
    most = facts.objects[1]
    live = np.arange(most) < count[:, None]  # [n, K]
    scene = draws.bits(Field.SCENE, 4)  # [n, 4]
    style = below(scene[:, 1], len(STYLES) - 1)
    objects = draws.bits(Field.OBJECT, 4 * most).reshape(n, most, 4)
    radius = np.array(facts.radii)[size] * (920 + below(objects[..., 1], 161) if sized else 1000) // 1000
    orientation = (below(objects[..., 3], 8) & TURNS[shape]) * rich
    place = draws.bits(Field.PLACE, 9).argsort(1, kind="stable")[:, :most]
    x, y, visible = _layout(draws, facts, split, live, shape, radius, texture, orientation, place)
    return Latents(
        level=level,
        split=split,
        seed=seed,
        index=_index(index),
        count=count,
        style=(np.full(n, STYLES.index("sketch")) if split == "style-test" else style) * rich,
        background=below(scene[:, 2], len(BACKGROUNDS)) * rich,
        background_rgb=_background(draws, sized),
        noise=(scene[:, 3] >> np.uint64(32)).astype(np.int64) * rich,
        shape=shape * live,
        colour=colour * live,
        size=size * live,
        texture=texture * live,
        orientation=orientation * live,
        place=place * live * sized,
        x=x * live,
        y=y * live,
        radius=radius * live,
        rgb=_rgb(draws, colour) * live[..., None],
        visible=visible * live,
        order=draws.bits(Field.ORDER, most).argsort(1, kind="stable"),
        wording=below(draws.bits(Field.WORDING, 3), np.array([5, 5, 2**16])),
    )


def attributes(level: str, split: str, index: Sequence[int] | np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """What there is in the samples `index`, but not where: several times faster than `sample`.

    Args:
        level: as `sample`.
        split: as `sample`.
        index: [n] as `sample`.
        seed: as `sample`.

    Returns:
        "count" [n]; "shape", "colour", "size", "texture" [n, K] int64, of which the first `count` of a row mean
        something.

    Raises:
        DataError: as `sample`.
    """
    facts = check(level, split)
    draws = _Draws(seed, level, split, _index(index))
    least, most = facts.objects
    count = least + below(draws.bits(Field.SCENE, 1)[:, 0], most - least + 1)
    shape, colour = _pairs(draws, facts, np.arange(most) < count[:, None], held_out=split == "comp-test")
    objects = draws.bits(Field.OBJECT, 4 * most).reshape(-1, most, 4)
    size = below(objects[..., 0], len(facts.radii))
    texture = below(objects[..., 2], len(TEXTURES)) * int(facts.rich)
    return {"count": count, "shape": shape, "colour": colour, "size": size, "texture": texture}


def _index(index: Sequence[int] | np.ndarray) -> np.ndarray:
    """[n] int64, checked."""
    index = np.asarray(index, np.int64).reshape(-1)
    if len(index) and not (index.min() >= 0 and index.max() < MAX_INDEX):
        raise DataError(f"scenes: index must be 0 .. 2**31 - 1; got {index.min()} .. {index.max()}")
    return index


def _redraw(n: int, draw: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Calls draw(rows, attempt) with all n rows, then again with those that it finds bad, until none is."""
    rows, attempt = np.arange(n), 0
    while len(rows):
        rows, attempt = rows[draw(rows, attempt)], attempt + 1


def _pairs(draws: _Draws, facts: Level, live: np.ndarray, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """(shape, colour) [n, K] each: pairs of the split; those of a scene differ, so that a pair tells which object."""
    table = _PAIRS[held_out == _IS_HELD_OUT]
    most = live.shape[1]
    chosen = np.zeros(live.shape, np.int64)
    # Every second object, and the last one, is a distractor of the one before it.
    second = (np.arange(most) % 2 == 1) | (np.arange(most) == live.sum(1, keepdims=True) - 1)

    def draw(rows: np.ndarray, attempt: int) -> np.ndarray:
        bits = draws.bits(Field.PAIR, most, attempt, rows)
        if facts.company:
            chosen[rows] = _company(bits, draws.bits(Field.COMPANY, 6 + most, attempt, rows), second[rows])
        else:
            chosen[rows] = below(bits, len(table))
            for k in range(1, most) if facts.distractors else ():
                kind, before = (bits[:, k] & np.uint64(1)).astype(np.int64), chosen[rows, k - 1]
                near, count = (each[kind, before] for each in _neighbours(held_out))
                distractor = near[np.arange(len(rows)), below(bits[:, k], count)]
                chosen[rows, k] = np.where(second[rows, k], distractor, chosen[rows, k])
        ordered = np.sort(np.where(live[rows], chosen[rows], -1 - np.arange(most)), 1)
        return (np.diff(ordered, axis=1) == 0).any(1) | (live[rows] & (chosen[rows] >= len(table))).any(1)

    _redraw(len(live), draw)
    chosen = np.minimum(chosen, len(table) - 1)
    return table[chosen, 0], table[chosen, 1]


@functools.cache
def _neighbours(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The other pairs [2, pairs, ...] of each pair's shape, and of its colour, and how many they are [2, pairs].

    Where there are none, those of the other kind stand; if there are none either, all others.
    """
    table = _PAIRS[held_out == _IS_HELD_OUT]
    others = ~np.eye(len(table), dtype=bool)
    near = (table[:, None] == table).transpose(2, 0, 1) & others  # [2, pairs, pairs]
    for more in (near[::-1].copy(), others[None]):
        near |= ~near.any(-1, keepdims=True) & more
    count = near.sum(-1)
    return np.argsort(~near, -1, kind="stable")[..., : count.max()], count


def _company(colour_bits: np.ndarray, bits: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[rows, K] places in the table of pairs that are not held out, or its length for a pair that is.

    Three shapes: two of a group and a common one, or three common ones; the first three objects have one each. A
    distractor of another shape has the colour of the object before it.
    """
    rows, most = np.arange(len(bits)), second.shape[1]
    group = below(bits[:, 0], 1000) // int(1000 * GROUP_SHARE)  # 0 and 1: a group; more: none
    common = _COMMON[bits[:, 6 : 6 + len(_COMMON)].argsort(1, kind="stable")[:, :3]]
    pair = _GROUPS[np.minimum(group, 1)][rows[:, None], bits[:, 1:4].argsort(1, kind="stable")[:, :2]]
    cast = np.where((group < 2)[:, None], np.concatenate([pair, common[:, :1]], 1), common)
    cast = cast[rows[:, None], bits[:, 3:6].argsort(1, kind="stable")]
    which = np.where(np.arange(most) < 3, np.arange(most), below(bits[:, 6:], 3))
    shape = cast[rows[:, None], which]
    colour = below(colour_bits, len(COLOURS))
    for k in range(1, most):
        follows = second[:, k] & (shape[:, k] != shape[:, k - 1])
        colour[:, k] = np.where(follows, colour[:, k - 1], colour[:, k])
    place = np.where(_IS_HELD_OUT, (~_IS_HELD_OUT).sum(), np.cumsum(~_IS_HELD_OUT) - 1)
    return place[shape * len(COLOURS) + colour]


def _rgb(draws: _Draws, colour: np.ndarray) -> np.ndarray:
    """[n, K, 3] a jittered colour of each object."""
    n, most = colour.shape
    lab = np.zeros((n, most, 3), np.int64)
    good = np.zeros((n, most), bool)

    def draw(rows: np.ndarray, attempt: int) -> np.ndarray:
        drawn = colours.jitter(colour[rows], draws.bits(Field.JITTER, 3 * most, attempt, rows).reshape(-1, most, 3))
        lab[rows] = np.where(good[rows, :, None], lab[rows], drawn)
        good[rows] |= colours.acceptable(drawn, colour[rows])
        return ~good[rows].all(1)

    _redraw(n, draw)
    return colours.to_rgb(lab).astype(np.int64)


def _background(draws: _Draws, sized: bool) -> np.ndarray:
    """[n, 2, 3] a light colour, faintly tinted except at L0, and a somewhat darker one."""
    bits = draws.bits(Field.BACKGROUND, 5)
    tint = (below(bits[:, 1:4], 17) - 8) * sized
    first = np.clip(250 - below(bits[:, :1], 45 if sized else 8) + tint, 0, 255)
    return np.stack([first, first - 18 - below(bits[:, 4:], 15)], 1)


def _layout(
    draws: _Draws,
    facts: Level,
    split: str,
    live: np.ndarray,
    shape: np.ndarray,
    radius: np.ndarray,
    texture: np.ndarray,
    orientation: np.ndarray,
    place: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, visible) [n, K] each: objects in their ninths of the image, apart, none too much covered."""
    n, most = live.shape
    centre = np.zeros((n, most, 2), np.int64)
    visible = np.zeros((n, most), np.int64)
    ranges = [_range(facts, third, radius) for third in (place % 3, place // 3)]
    hollow = (texture == TEXTURES.index("hollow")).astype(np.int64)
    pairs = live[:, :, None] & live[:, None, :] & ~np.eye(most, dtype=bool)  # [n, K, K]

    def draw(rows: np.ndarray, attempt: int) -> np.ndarray:
        bits = draws.bits(Field.POSITION, 2 * most, attempt, rows).reshape(-1, most, 2)
        for axis, (low, high) in enumerate(ranges):
            centre[rows, :, axis] = low[rows] + below(bits[..., axis], high[rows] - low[rows] + 1)
        # The first object's x tells the split, modulo 5: no scene is ever in two splits.
        centre[rows, 0, 0] += SPLITS.index(split) - centre[rows, 0, 0] % len(SPLITS)
        at, r = centre[rows], radius[rows]
        gap = abs(at[:, :, None] - at[:, None])  # [rows, K, K, 2]
        near = gap.max(-1) < APART if facts.overlap else (gap**2).sum(-1) <= (r[:, :, None] + r[:, None] + 10) ** 2
        bad = (pairs[rows] & near).any((1, 2))
        rest = rows[~bad]  # what is covered is looked at only in these
        visible[rest] = _visible(live[rest], shape[rest], hollow[rest], orientation[rest], centre[rest], radius[rest])
        bad[~bad] = (live[rest] & (visible[rest] < VISIBLE * POINTS)).any(1)
        return bad

    _redraw(n, draw)
    return centre[..., 0], centre[..., 1], visible


def _range(facts: Level, third: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest coordinate, [n, K] each, of a centre in a third of the image, the object inside it."""
    if len(facts.radii) == 1:  # one object anywhere
        return radius + 8, UNIT - radius - 8
    low = np.maximum(radius + 8, np.array([0, 341, 683])[third] + MARGIN)
    return low, np.minimum(UNIT - radius - 8, np.array([341, 683, UNIT])[third] - MARGIN)


def _visible(
    live: np.ndarray,
    shape: np.ndarray,
    hollow: np.ndarray,
    orientation: np.ndarray,
    centre: np.ndarray,
    radius: np.ndarray,
) -> np.ndarray:
    """[n, K] how many of each object's sample points no object in front covers; a hollow one covers its line alone."""
    cells, points = covered()
    frame = FRAMES[shape, orientation]  # [n, K, 2, 2]
    local = points[shape, hollow]  # [n, K, P, 2]
    right = local[..., :1] * frame[..., None, 0, :] + local[..., 1:] * frame[..., None, 1, :]  # inverse = transpose
    world = centre[:, :, None] + radius[..., None, None] * right * np.array([1, -1])  # [n, K, P, 2]
    seen = np.ones(world.shape[:-1], bool)
    most = live.shape[1]
    for back, front in itertools.combinations(range(most), 2):
        offset = (
            (world[:, back] - centre[:, front, None]) / np.maximum(radius[:, front, None, None], 1) * np.array([1, -1])
        )
        f = frame[:, front, None]  # [n, 1, 2, 2]
        uv = offset[..., :1] * f[..., 0] + offset[..., 1:] * f[..., 1]
        cell = np.floor((uv + 1) * (GRID / 2)).astype(np.int64)
        inside = ((cell >= 0) & (cell < GRID)).all(-1)
        cell = np.clip(cell, 0, GRID - 1)
        hides = cells[shape[:, front, None], hollow[:, front, None], cell[..., 1], cell[..., 0]]
        seen[:, back] &= ~(inside & hides & live[:, front, None])
    return seen.sum(-1)
