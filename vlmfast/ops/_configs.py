"""Which tile a Triton kernel over pairs computes with: a small table per GPU, width and number type."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """The shape of a tile, and how a program computes it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Target -> bytes of an operand's number -> (largest D, configuration). benchmarks/compile_gates.py says that they spill
# nothing; they have not been timed on a GPU.
CONFIGS: dict[str, dict[int, tuple[tuple[int, Config], ...]]] = {
    "sm_80": {
        2: ((128, Config(128, 128, 32, 8, 3)), (2**31, Config(128, 128, 64, 8, 3))),
        4: ((2**31, Config(64, 64, 32, 8, 3)),),
    },
    "sm_90": {
        2: ((128, Config(128, 128, 64, 8, 2)), (2**31, Config(128, 128, 64, 8, 3))),
        4: ((2**31, Config(64, 64, 32, 8, 3)),),
    },
    "sm_100": {
        2: ((128, Config(128, 128, 64, 8, 2)), (2**31, Config(128, 128, 64, 8, 3))),
        4: ((2**31, Config(64, 64, 32, 8, 3)),),
    },
    "gfx942": {
        2: ((2**31, Config(128, 128, 32, 8, 2)),),
        4: ((2**31, Config(64, 64, 32, 8, 2)),),
    },
    "interpreter": {
        2: ((2**31, Config(64, 256, 128, 4, 1)),),
        4: ((2**31, Config(64, 256, 128, 4, 1)),),
    },
}


def target(device: torch.device) -> str:
    """The row of CONFIGS for a device: the newest that is not newer than it."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(device)[0], "sm_100")


def choose(where: str, itemsize: int, D: int) -> Config:
    """The configuration for rows of D numbers of `itemsize` bytes on a target."""
    return next(config for most, config in CONFIGS[where][itemsize] if D <= most)
