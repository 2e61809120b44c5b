"""The twelve shapes as signed distances, in units of their radius: negative inside, y up, within the unit circle.

One source serves numpy and torch: `xp` is either module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Field = Any  # [k, H, W] float32, numpy.ndarray or torch.Tensor

BORDER = 0.17  # width of the line around a textured or hollow object, in radii


def _normals(n: int) -> list[tuple[float, float]]:
    """n unit vectors evenly around the circle, the first pointing up; rounded, so that sin and cos have no last bit."""
    angles = (math.pi / 2 + 2 * math.pi * k / n for k in range(n))
    return [(round(math.cos(a), 6), round(math.sin(a), 6)) for a in angles]


def _length(xp: Any, u: Field, v: Field) -> Field:
    return xp.sqrt(u * u + v * v)


def _box(xp: Any, u: Field, v: Field, width: float, height: float) -> Field:
    return xp.maximum(abs(u) - width, abs(v) - height)


def _polygon(xp: Any, u: Field, v: Field, normals: list[tuple[float, float]], inradius: float) -> Field:
    return functools.reduce(xp.maximum, [a * u + b * v for a, b in normals]) - inradius


def _circle(xp: Any, u: Field, v: Field) -> Field:
    return _length(xp, u, v) - 0.88


def _square(xp: Any, u: Field, v: Field) -> Field:
    return _box(xp, u, v, 0.7, 0.7)


def _triangle(xp: Any, u: Field, v: Field) -> Field:
    return _polygon(xp, u, -v, _normals(3), 0.5)


def _pentagon(xp: Any, u: Field, v: Field) -> Field:
    return _polygon(xp, u, -v, _normals(5), 0.76)


def _star(xp: Any, u: Field, v: Field) -> Field:
    # A point of the pentagram lies beyond at most one of its five lines: the second largest distance decides.
    first = second = -4.0 + 0.0 * u
    for a, b in _normals(5):
        line = a * u + b * v
        second = xp.maximum(second, xp.minimum(first, line))
        first = xp.maximum(first, line)
    return second - 0.309


def _cross(xp: Any, u: Field, v: Field) -> Field:
    return xp.minimum(_box(xp, u, v, 0.29, 0.92), _box(xp, u, v, 0.92, 0.29))


def _ring(xp: Any, u: Field, v: Field) -> Field:
    return abs(_length(xp, u, v) - 0.67) - 0.25


def _heart(xp: Any, u: Field, v: Field) -> Field:
    # A square on its corner, with a half circle on each of the two upper sides.
    side, v = abs(u), v + 0.08
    square = (side + abs(v)) * 0.7071 - 0.5
    return xp.minimum(square, _length(xp, side - 0.35355, v - 0.35355) - 0.5)


def _diamond(xp: Any, u: Field, v: Field) -> Field:
    return 0.85 * abs(u) + 0.5268 * abs(v) - 0.5268


def _crescent(xp: Any, u: Field, v: Field) -> Field:
    return xp.maximum(_length(xp, u, v) - 0.92, 0.72 - _length(xp, u - 0.42, v))


def _arrow(xp: Any, u: Field, v: Field) -> Field:
    head = xp.maximum(0.05 - u, 0.6402 * u + 0.7682 * abs(v) - 0.6082)
    return xp.minimum(_box(xp, u + 0.4, v, 0.55, 0.26), head)


def _car(xp: Any, u: Field, v: Field) -> Field:
    body = _box(xp, u, v + 0.13, 0.92, 0.25)
    cabin = xp.maximum(abs(v - 0.25) - 0.3, xp.maximum(-u - 0.72 + 0.3 * v, 0.8 * u + 0.6 * v - 0.5))
    wheels = _length(xp, abs(u) - 0.53, v + 0.38) - 0.25
    return xp.minimum(xp.minimum(body, cabin), wheels)


SIGNED_DISTANCE: dict[str, Callable[[Any, Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "pentagon": _pentagon,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "diamond": _diamond,
    "crescent": _crescent,
    "arrow": _arrow,
    "car": _car,
}
SHAPES = tuple(SIGNED_DISTANCE)

# Which bits of the orientation, in eighths of a turn, a shape has: a square on its corner would be called a diamond, a
# car only faces right (0) or left (4), and round shapes have none. The arrow points where the orientation says.
TURNS = np.array([{"circle": 0, "ring": 0, "square": 6, "cross": 6, "diamond": 6, "car": 4}.get(s, 7) for s in SHAPES])

_R = math.sqrt(0.5)
_ANGLES = [(1, 0), (_R, _R), (0, 1), (-_R, _R), (-1, 0), (-_R, -_R), (0, -1), (_R, -_R)]
# [12, 8, 2, 2]: (u, v) of the shape = FRAME @ (right, up) of the image. A car that faces left is mirrored.
FRAMES = np.array([[[(c, s), (-s, c)] for c, s in _ANGLES] for _ in SHAPES], np.float64)
FRAMES[SHAPES.index("car"), 4] = [(-1, 0), (0, 1)]

GRID = 48  # cells across the unit square's side in the table of what each shape covers
POINTS = 96  # sample points of each shape


@functools.cache
def covered() -> tuple[np.ndarray, np.ndarray]:
    """What each shape covers, whole and hollow: cells [12, 2, GRID, GRID] bool, points [12, 2, POINTS, 2]."""
    axis = (np.arange(GRID) + 0.5) * (2 / GRID) - 1
    u, v = axis[None, :], axis[:, None]
    cells = np.zeros((len(SHAPES), 2, GRID, GRID), bool)
    points = np.zeros((len(SHAPES), 2, POINTS, 2))
    for s, distance in enumerate(SIGNED_DISTANCE.values()):
        d = distance(np, u + 0 * v, v + 0 * u)
        for hollow, inside in enumerate((d <= 0, (d <= 0) & (d >= -BORDER))):
            cells[s, hollow] = inside
            rows, columns = np.nonzero(inside)
            spread = np.arange(POINTS) * len(rows) // POINTS
            points[s, hollow] = np.stack([axis[columns[spread]], axis[rows[spread]]], -1)
    return cells, points
