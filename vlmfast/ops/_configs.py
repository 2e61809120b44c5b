"""Which tile a Triton kernel over pairs computes with: what `vlmfast tune` found on this machine, else a small table.

Neither depends on a batch size, so that no batch size compiles anything anew.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """The shape of a tile, and how a program computes it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "{}×{}×{}, {} warps, {} stages".format(*self)


class Case(NamedTuple):
    """What a tile is chosen for."""

    kind: str  # whose lines use the tile up, one of KINDS
    operands: str  # what is multiplied, one of OPERANDS
    loads: str  # "descriptors" for the copy unit of Hopper and later, else "pointers"
    depth: int  # the least of DEPTHS that holds D


class Machine(NamedTuple):
    """What a measured tile is good for."""

    gpu: str
    capability: str
    triton: str


KINDS = ("softmax", "positives", "sigmoid", "hinge", "hardest", "topk", "ranks", "matrix", "vocabulary")
LIGHT = ("softmax",)  # few numbers an element, in bfloat16; half a tile has the registers for all else
DESCRIPTORS = ("sm_90", "sm_100")  # targets with a copy unit that takes tiles
OPERANDS = ("bfloat16", "float16", "bf16x3", "tf32", "ieee", "ieee of bfloat16", "ieee of float16")
DEPTHS = (64, 128, 256, 512, 768, 1024, 2**31)
LIMITS = Config(256, 256, 256, 16, 8)  # of a tile from a file; blocks of S are whole tiles up to this size

# Target -> bytes of an operand's number -> (largest D, light kernels' tile, that of the others). `make compile-gates`
# says that they spill nothing; they have not been timed on a GPU.
CONFIGS: dict[str, dict[int, tuple[tuple[int, Config, Config], ...]]] = {
    "sm_80": {
        2: ((2**31, Config(128, 64, 32, 8, 4), Config(128, 64, 32, 8, 4)),),
        4: ((2**31, Config(64, 32, 16, 4, 4), Config(64, 32, 16, 4, 4)),),
    },
    "sm_90": {
        2: (
            (128, Config(128, 128, 64, 8, 2), Config(128, 64, 64, 8, 2)),
            (2**31, Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        ),
        4: ((2**31, Config(64, 32, 32, 8, 3), Config(64, 32, 32, 8, 3)),),
    },
    "sm_100": {
        2: (
            (128, Config(128, 64, 64, 8, 2), Config(128, 32, 64, 8, 2)),
            (2**31, Config(128, 64, 64, 8, 4), Config(128, 32, 64, 8, 4)),
        ),
        4: ((2**31, Config(64, 32, 16, 8, 4), Config(64, 32, 16, 8, 4)),),
    },
    "gfx942": {
        2: ((2**31, Config(128, 64, 32, 8, 2), Config(128, 64, 32, 8, 2)),),
        4: ((2**31, Config(64, 32, 32, 8, 2), Config(64, 32, 32, 8, 2)),),
    },
    "interpreter": {
        2: ((2**31, Config(64, 128, 128, 4, 1), Config(64, 128, 128, 4, 1)),),
        4: ((2**31, Config(64, 128, 128, 4, 1), Config(64, 128, 128, 4, 1)),),
    },
}

# Target -> tile -> the kinds of kernel that `vlmfast tune` measures it for: in bfloat16 they spill nothing with it.
# With other operands, a tile that spills is found out when it is tried.
CANDIDATES: dict[str, dict[Config, str]] = {
    "sm_80": {
        Config(128, 128, 32, 8, 3): "hinge hardest topk",
        Config(128, 128, 64, 8, 3): "hinge hardest",
        Config(128, 64, 32, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 64, 8, 3): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 32, 4, 3): "softmax hinge hardest topk",
        Config(128, 64, 64, 4, 3): "softmax hinge hardest topk",
        Config(64, 128, 32, 4, 4): "softmax hinge hardest topk",
        Config(64, 128, 64, 8, 3): "softmax sigmoid hinge hardest topk",
        Config(64, 64, 64, 4, 3): "softmax sigmoid hinge hardest topk",
        Config(256, 64, 32, 8, 3): "softmax hinge hardest",
        Config(64, 256, 32, 8, 3): "softmax hinge hardest topk",
    },
    "sm_90": {
        Config(256, 128, 64, 8, 3): "hardest",
        Config(128, 256, 64, 8, 3): "hardest",
        Config(128, 128, 64, 8, 3): "softmax hinge hardest topk",
        Config(128, 128, 64, 8, 4): "softmax hinge hardest topk",
        Config(128, 128, 128, 8, 2): "softmax hinge hardest topk",
        Config(128, 128, 64, 16, 3): "hinge hardest topk",
        Config(256, 64, 64, 8, 3): "softmax hinge hardest topk",
        Config(64, 256, 64, 8, 3): "softmax hinge hardest topk",
        Config(128, 64, 64, 8, 3): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 64, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 128, 8, 2): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 64, 4, 4): "softmax hinge hardest topk",
        Config(64, 128, 64, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(64, 128, 64, 4, 3): "softmax hinge hardest topk",
        Config(64, 128, 64, 4, 4): "softmax hinge hardest topk",
        Config(64, 64, 64, 4, 4): "softmax sigmoid hinge hardest topk",
    },
    "sm_100": {
        Config(256, 64, 64, 8, 3): "hinge hardest topk",
        Config(128, 64, 64, 8, 3): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 64, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 128, 8, 2): "softmax sigmoid hinge hardest topk",
        Config(64, 128, 64, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(64, 64, 64, 4, 4): "softmax sigmoid hinge hardest topk",
        Config(64, 64, 64, 8, 4): "softmax sigmoid hinge hardest",
        Config(256, 32, 64, 8, 3): "softmax sigmoid hinge hardest topk",
        Config(128, 32, 64, 8, 4): "softmax sigmoid hinge hardest topk",
        Config(128, 32, 64, 4, 4): "softmax sigmoid hinge hardest topk",
        Config(128, 32, 128, 8, 2): "softmax sigmoid hinge hardest topk",
    },
    "gfx942": {
        Config(128, 128, 32, 8, 2): "sigmoid hinge hardest",
        Config(128, 128, 64, 8, 2): "sigmoid hinge hardest",
        Config(128, 128, 32, 4, 2): "sigmoid hinge hardest topk",
        Config(256, 64, 32, 8, 2): "sigmoid hinge hardest",
        Config(128, 64, 32, 8, 2): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 64, 8, 2): "softmax sigmoid hinge hardest topk",
        Config(128, 64, 32, 4, 2): "softmax sigmoid hinge hardest topk",
        Config(64, 128, 32, 8, 2): "softmax sigmoid hinge hardest topk",
        Config(64, 128, 32, 4, 2): "softmax sigmoid hinge hardest topk",
        Config(64, 64, 64, 4, 2): "softmax sigmoid hinge hardest topk",
    },
}

_trial: tuple[Config | None, list[Case]] | None = None  # of `trying`


def target(device: torch.device) -> str:
    """The row of CONFIGS for a device: the newest that is not newer than it."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(device)[0], "sm_100")


def case(kind: str, dtype: torch.dtype, precision: str, descriptors: bool, D: int) -> Case:
    """What a tile is chosen for, for rows of D numbers of `dtype`."""
    operands = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        operands = precision
    elif precision == "ieee":
        operands = f"ieee of {operands}"
    return Case(kind, operands, "descriptors" if descriptors else "pointers", next(d for d in DEPTHS if d >= D))


def choose(device: torch.device, where: str, wanted: Case) -> Config:
    """The tile for a case on a device: a tuned one, else the shipped one of its target."""
    if _trial is not None:
        config, asked = _trial
        asked.append(wanted)
        return config or shipped(where, wanted)
    return tuned(device).get(wanted) or shipped(where, wanted)


def shipped(where: str, wanted: Case) -> Config:
    """The table's tile for a case on a target."""
    itemsize = 4 if wanted.operands in ("tf32", "ieee") else 2
    light = wanted.kind in LIGHT and wanted.operands == "bfloat16"
    if where in DESCRIPTORS and wanted.loads == "pointers":
        light = False  # the addresses of a tile take registers
    row = next(row for row in CONFIGS[where][itemsize] if wanted.depth <= row[0])
    return row[1] if light else row[2]


@contextmanager
def trying(config: Config | None) -> Iterator[list[Case]]:
    """Every kernel over tiles runs with `config` (None: the shipped tile); yields the list of cases that were asked."""
    global _trial
    before, _trial = _trial, (config, [])
    try:
        yield _trial[1]
    finally:
        _trial = before


# Tuned tiles, in a file


def cache_file() -> Path:
    """Where tuned tiles are kept: in the folder $VLMFAST_CACHE, else in ~/.cache/vlmfast."""
    folder = os.environ.get("VLMFAST_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(folder) if folder else home / "vlmfast") / "tiles-v1.json"


@lru_cache
def machine(device: torch.device) -> Machine:
    """What tiles that are measured on a device are good for."""
    version = str(getattr(sys.modules.get("triton"), "__version__", ""))  # imported by _tiles alone
    if device.type != "cuda":
        return Machine(device.type, "", version)
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(torch.cuda.get_device_name(device), f"{major}.{minor}", version)


@lru_cache
def tuned(device: torch.device) -> Mapping[Case, Config]:
    """The tuned tiles of a device; none with VLMFAST_TUNED=0. The file is read once a process."""
    if os.environ.get("VLMFAST_TUNED") == "0":
        return {}
    here = machine(device)
    return {wanted: config for (owner, wanted), config in _read(cache_file()).items() if owner == here}


def store(device: torch.device, found: Mapping[Case, Config | None]) -> Path:
    """Puts tuned tiles of a device into the file, None for a case without one, and returns the file's path.

    The file is replaced at once, so that no reader finds half of it; entries of other machines stay.

    Args:
        device: where they were measured.
        found: case -> its tile.
    Raises:
        OSError: the file cannot be written.
    """
    path, here = cache_file(), machine(device)
    entries = _read(path)
    for wanted, config in found.items():
        entries.pop((here, wanted), None)
        if config is not None:
            entries[here, wanted] = config
    rows = [
        json.dumps({**owner._asdict(), **wanted._asdict(), "tile": config})
        for (owner, wanted), config in sorted(entries.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write('{"version": 1, "tiles": [\n' + ",\n".join(rows) + "\n]}\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    tuned.cache_clear()
    return path


def _read(path: Path) -> dict[tuple[Machine, Case], Config]:
    """The file's entries; none, and a warning in one line, if any of it is not as `store` writes it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, str(error))
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != 1 or content.keys() != {"version", "tiles"}:
            raise ValueError("it is not of version 1")
        return dict(_entry(row) for row in content["tiles"])
    except (ValueError, TypeError, RecursionError) as error:
        return _ignored(path, str(error))


def _ignored(path: Path, why: str) -> dict:
    line = " ".join(why.split())[:200]
    warnings.warn(f"tuned tiles in {path} are ignored: {line}; `vlmfast tune` writes them anew", stacklevel=2)
    return {}


def _entry(row: object) -> tuple[tuple[Machine, Case], Config]:
    """One line of the file. Raises ValueError for one that this version does not know."""
    fields = {*Machine._fields, *Case._fields, "tile"}
    if not isinstance(row, dict) or row.keys() != fields:
        raise ValueError(f"an entry needs {', '.join(sorted(fields))}, and nothing else; got {row!r}")
    owner, wanted = Machine(*(row[name] for name in Machine._fields)), Case(*(row[name] for name in Case._fields))
    known = wanted.kind in KINDS and wanted.operands in OPERANDS and wanted.loads in ("descriptors", "pointers")
    if not (known and wanted.depth in DEPTHS and all(isinstance(name, str) for name in owner)):
        raise ValueError(f"unknown kind, operands, loads or depth in {row!r}")
    tile = row["tile"]
    if not isinstance(tile, list) or len(tile) != len(LIMITS) or not all(type(number) is int for number in tile):
        raise ValueError(f"a tile is five whole numbers; got {tile!r}")
    config = Config(*tile)
    powers = all(number >= 16 and number & (number - 1) == 0 for number in config[:3])
    warps = config.warps in (1, 2, 4, 8, 16)
    if not (powers and warps and config.stages >= 1 and all(a <= b for a, b in zip(config, LIMITS, strict=True))):
        raise ValueError(f"tile {tile} is beyond {list(LIMITS)}, or not of powers of two from 16 on")
    return (owner, wanted), config
