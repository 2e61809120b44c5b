"""`vlmfast tune`: the fastest tiles for this machine's GPU."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.bench import tune


@dataclass(frozen=True)
class Config(tune.Tune):
    """Measures which tiles the Triton kernels are fastest with on this GPU, and keeps them for every later process.

    They are kept in $VLMFAST_CACHE, else ~/.cache/vlmfast, in tiles-v1.json; VLMFAST_TUNED=0 ignores that file.

    For example:
        vlmfast tune --dim 512,768 --dtype bfloat16
        vlmfast tune --ops clip --batch 32768 --json tiles.json
        vlmfast tune --dry-run --target sm_90
    """


def run(config: Config) -> None:
    """Tunes, keeps what is better than the shipped tiles, and prints the table.

    Args:
        config: the flags.
    """
    tune.main(config)
