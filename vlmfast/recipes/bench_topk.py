"""`vlmfast bench topk`: what exact search costs, ours beside a matrix product and a sort."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.bench import topk


@dataclass(frozen=True)
class Config(topk.TopkBench):
    """Measures time, memory and recall of exact search for the k most similar items, ours beside PyTorch's.

    For example:
        vlmfast bench topk --device cpu --queries 256 --items 16384 --dim 512 --k 10
        vlmfast bench topk --device cuda --dtype bfloat16 --queries 8192 --items 1048576 --json topk.json
    """


def run(config: Config) -> None:
    """Runs the benchmark, writes the file that is named and prints the table.

    Args:
        config: the flags.
    """
    topk.main(config)
