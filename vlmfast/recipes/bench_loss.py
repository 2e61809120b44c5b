"""`vlmfast bench loss`: what a contrastive loss costs, ours beside its rivals."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.bench import loss


@dataclass(frozen=True)
class Config(loss.LossBench):
    """Measures time, memory and error of a contrastive loss, ours beside its rivals, interleaved on the same pairs.

    For example:
        vlmfast bench loss --device cpu --threads 1 --batch 1024,4096 --dim 512 --dtype float32 --loss clip
        vlmfast bench loss --loss siglip --batch 1024..16384:x2 --json loss.json --csv loss.csv --plot loss.png
        vlmfast bench loss --batch 65536 --providers vlmfast,linear-cross-entropy --rounds 1 --seconds 0
    """


def run(config: Config) -> None:
    """Runs the benchmark, writes the files that are named and prints the tables.

    Args:
        config: the flags.
    """
    loss.main(config)
