"""Images of scenes: signed distances to coverage, layer by layer, with numpy or with torch from one source.

`xp` is the numpy or the torch module, `put` moves a numpy array to where the image is made. Only + − × ÷, sqrt, floor,
abs, min and max are used, element by element. IEEE 754 rounds them alike everywhere, so numpy's images do not depend on
their batch or on the machine. Torch's sqrt can be off by a last bit, and a pixel then by 1 of 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.scenes.latents import BACKGROUNDS, STYLES, TEXTURES, UNIT, Latents
from vlmfast.data.scenes.shapes import BORDER, FRAMES, SHAPES, SIGNED_DISTANCE

Field = Any  # float32 [k, H, W] or [k, 3, H, W], numpy.ndarray or torch.Tensor
CHUNK_PIXELS = 2**18  # pixels at a time in numpy, so that a pass over them stays in cache

EDGE = 0.1  # width of the line around a textured object, in radii


@dataclass(frozen=True)
class _Canvas:
    """Where and how n images of one style are made."""

    xp: Any
    put: Callable[[np.ndarray], Any]
    size: int
    style: str

    def axis(self) -> Field:
        """[size] centres of the pixels, in 1024ths of the image."""
        return self.put(((np.arange(self.size) + 0.5) * (UNIT / self.size)).astype(np.float32))

    def column(self, values: np.ndarray) -> Field:
        """One number an image, [n, 1, 1] float32."""
        return self.put(values.astype(np.float32).reshape(-1, 1, 1))

    def window(self, centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
        """[k, w] the pixels along an axis that objects can change, and as many more to be w for all of them.

        With torch all pixels: on a GPU cutting windows out takes longer than computing them all.
        """
        # The soft shadow of a star, the longest, ends 1.81 radii from its centre; its tip is smoothed over 1.6 pixels.
        reach = (1.9 if self.style == "photo" else 1.1) * radius.max() * self.size / UNIT + 3
        width = min(self.size, 2 * math.ceil(reach) + 1) if self.xp is np else self.size
        first = np.clip(centre * self.size // UNIT - width // 2, 0, self.size - width)
        return first[:, None] + np.arange(width)


def render(latents: Latents, image_size: int) -> np.ndarray:
    """uint8 images [n, 3, image_size, image_size] of the scenes, made by numpy.

    Args:
        latents: n scenes.
        image_size: side in pixels, the same scene at any.
    """
    images = np.empty((len(latents), 3, image_size, image_size), np.uint8)
    step = max(1, CHUNK_PIXELS // image_size**2)
    for style in np.unique(latents.style):
        rows = np.flatnonzero(latents.style == style)
        canvas = _Canvas(np, np.asarray, image_size, STYLES[style])
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            images[some] = _paint(canvas, latents.take(some)).astype(np.uint8)
    return images


def render_torch(latents: Latents, image_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The images of `render` as a tensor, made by torch on `device`.

    Args:
        latents: n scenes.
        image_size: side in pixels.
        device: where to make them.

    Returns:
        [n, 3, image_size, image_size] uint8 on `device`.
    """
    images = torch.empty(len(latents), 3, image_size, image_size, dtype=torch.uint8, device=device)
    for style in np.unique(latents.style):
        rows = np.flatnonzero(latents.style == style)
        canvas = _Canvas(torch, lambda array: torch.as_tensor(array, device=device), image_size, STYLES[style])
        images[canvas.put(rows)] = _paint(canvas, latents.take(rows)).to(torch.uint8)
    return images


def _paint(canvas: _Canvas, latents: Latents) -> Field:
    """[n, 3, H, W] whole numbers 0 .. 255."""
    xp = canvas.xp
    image = _background(canvas, latents)
    for layer in range(latents.shape.shape[1]):
        for shape in range(len(SHAPES)):
            rows = np.flatnonzero((latents.count > layer) & (latents.shape[:, layer] == shape))
            if len(rows):
                _draw(canvas, image, latents, rows, layer)
    image = _finish(canvas, image, latents)
    return xp.floor(xp.clip(image, 0, 255) + 0.5)


def _background(canvas: _Canvas, latents: Latents) -> Field:
    """[n, 3, H, W] float32."""
    xp, axis, n = canvas.xp, canvas.axis(), len(latents)
    rgb = latents.background_rgb.astype(np.float32).reshape(n, 2, 3, 1, 1)
    if canvas.style == "sketch":
        rgb = rgb * np.float32(0.2) + np.float32(200)
    first, second = canvas.put(rgb[:, 0]), canvas.put(rgb[:, 1])
    share = canvas.put(np.zeros((n, canvas.size, canvas.size), np.float32))  # of the second colour
    for kind, name in enumerate(BACKGROUNDS):
        rows = np.flatnonzero(latents.background == kind)
        if not len(rows) or name == "solid":
            continue
        seed = latents.noise[rows]
        if name == "gradient":
            slope = canvas.column(seed % 3 - 1), canvas.column(seed // 3 % 3 - 1)
            value = 0.5 + (slope[0] * (axis[None, None] - 512) + slope[1] * (axis[None, :, None] - 512)) * 0.00048828125
        elif name == "noise":
            value = _clouds(canvas, seed, 7)
        elif name == "grid":
            pitch = canvas.column(70 + seed % 70)
            across, down = (
                _lines(xp, a, pitch, 5, UNIT / canvas.size) for a in (axis[None, None], axis[None, :, None])
            )
            value = 1 - xp.minimum(across, down)
        else:
            value = _clutter(canvas, seed)
        share[canvas.put(rows)] = value + canvas.put(np.zeros((1, canvas.size, canvas.size), np.float32))
    return first + share[:, None] * (second - first)


def _lines(xp: Any, x: Field, pitch: Field, width: float, pixel: Field) -> Field:
    """0 on lines of a width, `pitch` apart, 1 between them; smoothed over a pixel."""
    turns = x * (1 / pitch)
    distance = abs(turns - xp.floor(turns) - 0.5) * pitch - width / 2
    return xp.clip(distance / pixel + 0.5, 0, 1)


def _clutter(canvas: _Canvas, seed: np.ndarray) -> Field:
    """[n, H, W] in 0 .. 1: specks of random size and place, one in most cells of a 9 x 9 lattice."""
    xp, cells = canvas.xp, 9
    size, right, down = (_noise(canvas, seed + k, cells) for k in (11, 12, 13))  # [n, cells, cells]
    turns = canvas.axis() * (cells / UNIT)
    cell = canvas.put(np.arange(canvas.size) * cells // canvas.size)
    local = turns - xp.floor(turns)
    size, right, down = (x[:, cell][:, :, cell] for x in (size, right, down))
    dx, dy = local[None, None] - 0.3 - 0.4 * right, local[None, :, None] - 0.3 - 0.4 * down
    return xp.clip((0.3 * size - xp.sqrt(dx * dx + dy * dy)) * (canvas.size / cells) + 0.5, 0, 1)


def _draw(canvas: _Canvas, image: Field, latents: Latents, rows: np.ndarray, layer: int) -> None:
    """Adds the layer's objects of some rows, all of one shape, to the image."""
    xp = canvas.xp
    shape, texture = int(latents.shape[rows[0], layer]), latents.texture[rows, layer]
    distance_to = SIGNED_DISTANCE[SHAPES[shape]]
    radius = latents.radius[rows, layer]
    frame = FRAMES[shape, latents.orientation[rows, layer]]
    a, b, c, d = (canvas.column(frame[:, i, j]) for i in range(2) for j in range(2))
    across, down = (canvas.window(centre[rows, layer], radius) for centre in (latents.x, latents.y))  # [k, w] each
    axis = canvas.axis()
    x, y = axis[canvas.put(across)][:, None, :], axis[canvas.put(down)][:, :, None]  # [k, 1, w], [k, w, 1]
    right = (x - canvas.column(latents.x[rows, layer])) / canvas.column(radius)  # [k, 1, w] in radii
    up = (canvas.column(latents.y[rows, layer]) - y) / canvas.column(radius)  # [k, w, 1] in radii
    pixel = canvas.column(UNIT / canvas.size / radius)  # a pixel's side in radii
    hollow = canvas.column(texture == TEXTURES.index("hollow"))
    rgb = latents.rgb[rows, layer].astype(np.float32).reshape(-1, 3, 1, 1)
    dark = (latents.rgb[rows, layer] * (299, 587, 114)).sum(-1).reshape(-1, 1, 1, 1) < 145_000
    gap = canvas.put(np.where(dark, np.float32(250), np.float32(0.35) * rgb))  # the other colour of a texture
    colour = canvas.put(rgb)

    u, v = a * right + b * up, c * right + d * up
    if canvas.style == "sketch":  # an unsteady hand
        u, v = u + 0.035 * _wave(xp, 1.3 * v + 0.2), v + 0.035 * _wave(xp, 1.1 * u)
    edge = EDGE if canvas.style == "sketch" else EDGE + (BORDER - EDGE) * hollow
    distance = distance_to(xp, u, v)
    cover = xp.clip(0.5 - distance / pixel, 0, 1)
    inner = xp.clip(0.5 - (distance + edge) / pixel, 0, 1)
    ink = xp.ones_like(u)
    for kind in np.unique(texture):
        some = canvas.put(np.flatnonzero(texture == kind))
        ink[some] = _ink(xp, TEXTURES[kind], u[some], v[some], pixel[some])
    alpha = cover - hollow * inner

    width = across.shape[1]
    corners = zip(rows.tolist(), down[:, 0].tolist(), across[:, 0].tolist(), strict=True)
    views = [] if width == canvas.size else [image[k, :, j : j + width, i : i + width] for k, j, i in corners]
    under = xp.stack(views) if views else image[canvas.put(rows)]
    if canvas.style == "sketch":  # strokes for paint, on paper
        strokes = _lines(xp, x + y, 36, 18, 1448 / canvas.size)
        ink, gap = ink * (0.8 - 0.45 * strokes), 246
    if canvas.style == "photo":  # light from the top left, a soft shadow to the bottom right
        x, y = right - 0.16, up + 0.16
        distance = distance_to(xp, a * x + b * y, c * x + d * y)
        shadow, hole = (xp.clip(0.5 - 2.5 * (distance + depth), 0, 1) for depth in (0, BORDER))
        under = under * (1 - 0.4 * (shadow - hollow * hole))[:, None]
        colour = colour * (1 + 0.16 * xp.clip(up - right, -1.5, 1.5))[:, None]
    fill = gap + (1 - (1 - ink) * inner)[:, None] * (colour - gap)
    over = under + alpha[:, None] * (fill - under)
    if not views:
        image[canvas.put(rows)] = over
    for view, pixels in zip(views, over, strict=False):
        view[...] = pixels


def _wave(xp: Any, x: Field) -> Field:
    """A triangle wave of period 1 between -1 and 1."""
    return abs(x - xp.floor(x) - 0.5) * 4 - 1


def _ink(xp: Any, texture: str, u: Field, v: Field, pixel: Field) -> Field:
    """[k, H, W]: 1 where the texture has the object's colour, 0 where it is light."""
    if texture == "striped":
        return _lines(xp, v, 0.4, 0.2, pixel)
    if texture == "dotted":
        du, dv = (t - xp.floor(t) - 0.5 for t in (2.25 * u, 2.25 * v))
        return xp.clip((xp.sqrt(du * du + dv * dv) - 0.28) * 0.444 / pixel + 0.5, 0, 1)
    if texture == "checkered":
        sides = [xp.clip(_wave(xp, 1.8 * t) * 0.139 / pixel, -0.5, 0.5) for t in (u, v)]
        return 0.5 + 2 * sides[0] * sides[1]
    return xp.ones_like(u)


def _finish(canvas: _Canvas, image: Field, latents: Latents) -> Field:
    """What a style does to the whole image."""
    size = canvas.size
    if canvas.style == "textured":
        grain = 0.28 * _clouds(canvas, latents.noise + 1, 24) + 0.16 * _noise(canvas, latents.noise + 2, size)
        return image * (0.78 + grain)[:, None]
    if canvas.style == "photo":
        before, after = (canvas.put(np.clip(np.arange(size) + k, 0, size - 1)) for k in (-1, 1))
        image = 0.18 * image[..., before] + 0.64 * image + 0.18 * image[..., after]
        image = 0.18 * image[..., before, :] + 0.64 * image + 0.18 * image[..., after, :]
        centred = (canvas.axis() - 512) * 0.001953125  # -1 .. 1
        corner = centred[None, :] * centred[None, :] + centred[:, None] * centred[:, None]
        return image * (1 - 0.11 * corner * corner) + 22 * (_noise(canvas, latents.noise + 3, size) - 0.5)[:, None]
    if canvas.style == "sketch":
        return image + 10 * (_noise(canvas, latents.noise + 4, size) - 0.5)[:, None]
    return image


def _noise(canvas: _Canvas, seed: np.ndarray, cells: int) -> Field:
    """[n, cells, cells] float32 in 0 .. 1, independent everywhere: a hash of the seed and the place."""
    mask = 0xFFFFFFFF  # 32-bit arithmetic in int64: the multipliers below 2**31 keep every product below 2**63
    place = canvas.put(np.arange(cells))
    h = (place[None, None] * 0x1B873593 + place[None, :, None] * 0x19D699A5 + canvas.put(seed.reshape(-1, 1, 1))) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & mask
    return canvas.xp.asarray((h >> 12) & 0xFFFF, dtype=canvas.xp.float32) * 2.0**-16


def _clouds(canvas: _Canvas, seed: np.ndarray, cells: int) -> Field:
    """[n, H, W] in 0 .. 1: noise on a lattice of cells x cells, interpolated smoothly."""
    xp = canvas.xp
    lattice = _noise(canvas, seed, cells + 1)
    turns = canvas.axis() * (cells / UNIT)
    floor = xp.floor(turns)
    t = turns - floor
    t = t * t * (3 - 2 * t)
    cell = canvas.put(((np.arange(canvas.size) + 0.5) * (cells / canvas.size)).astype(np.int64))
    rows = lattice[:, cell] + t[None, :, None] * (lattice[:, cell + 1] - lattice[:, cell])
    return rows[..., cell] + t[None, None] * (rows[..., cell + 1] - rows[..., cell])
