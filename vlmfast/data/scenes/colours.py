"""The ten colours: prototypes in CIE Lab, jitter around them, and Lab to 8-bit sRGB.

Everything is integer arithmetic or float64 + − × ÷, which IEEE 754 rounds alike on every machine.
"""

from __future__ import annotations

import numpy as np

# Lab (D65) of sRGB colours well inside the gamut; the nearest two, blue and purple, are 26 apart.
PROTOTYPES = {
    "red": (46, 65, 43),
    "orange": (66, 36, 67),
    "yellow": (84, -4, 75),
    "green": (55, -48, 38),
    "cyan": (71, -32, -16),
    "blue": (40, 27, -63),
    "purple": (38, 46, -45),
    "pink": (69, 46, -8),
    "brown": (36, 16, 28),
    "gray": (54, 0, 0),
}
COLOURS = tuple(PROTOTYPES)
LAB = np.array(list(PROTOTYPES.values()), np.int64)  # [10, 3]

UNIT = 64  # Lab is kept in 64ths
SIGMA = 6  # standard deviation of the jitter on each axis, in Lab units

_TO_LINEAR_RGB = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
_WHITE = (0.95047, 1.0, 1.08883)
# Linear light at which sRGB steps from k to k + 1 of 255. Rounded to 9 digits, so that the last bit of a machine's pow
# cannot move a step.
_STEPS = np.round(
    [((k + 0.5) / 255 / 12.92) if k < 10 else (((k + 0.5) / 255 + 0.055) / 1.055) ** 2.4 for k in range(255)], 9
)


def jitter(colour: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """[..., 3] int64 Lab in 64ths: the prototype of each colour plus noise of standard deviation SIGMA.

    Args:
        colour: [...] indices into COLOURS.
        bits: [..., 3] uint64 random bits; the sum of each one's four 16-bit quarters is close to a normal number.
    """
    quarters = np.stack([(bits >> np.uint64(16 * k)).astype(np.int64) & 0xFFFF for k in range(4)])
    centred = quarters.sum(0) - 2 * 0xFFFF  # standard deviation 37 837 = 2 · 65 536 / sqrt(12)
    return UNIT * LAB[colour] + centred * (UNIT * SIGMA) // 37837


def acceptable(lab: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """[...] bool: the colour is displayable, and its own prototype is nearer than any other by a clear margin.

    Args:
        lab: [..., 3] int64 Lab in 64ths.
        colour: [...] the index that each was drawn for.
    """
    squared = ((lab[..., None, :] - UNIT * LAB) ** 2).sum(-1)  # [..., 10]
    own = np.take_along_axis(squared, colour[..., None], -1)[..., 0]
    others = np.where(np.arange(len(LAB)) == colour[..., None], np.iinfo(np.int64).max, squared).min(-1)
    linear = _linear_rgb(lab)
    return (6 * own < 5 * others) & (linear >= 0).all(-1) & (linear <= 1).all(-1)


def to_rgb(lab: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 sRGB of Lab in 64ths."""
    return np.searchsorted(_STEPS, _linear_rgb(lab)).astype(np.uint8)


def _linear_rgb(lab: np.ndarray) -> np.ndarray:
    """[..., 3] float64 linear sRGB of Lab in 64ths; outside [0, 1] where it cannot be displayed."""
    lightness, a, b = (lab[..., k] / UNIT for k in range(3))
    y = (lightness + 16) / 116
    cubes = [np.where(t > 6 / 29, t * t * t, (t - 4 / 29) * (108 / 841)) for t in (y + a / 500, y, y - b / 200)]
    xyz = [white * cube for white, cube in zip(_WHITE, cubes, strict=True)]
    return np.stack([r * xyz[0] + g * xyz[1] + b * xyz[2] for r, g, b in _TO_LINEAR_RGB], -1)
