"""What vlmfast/distributed.py says without a process group, and what it decides; the rest is in tests/losses."""

import subprocess
import sys

import pytest
import torch

from vlmfast import distributed
from vlmfast.distributed import Gather, Ranks, Ring, gather_rows, transport
from vlmfast.errors import BackendError
from vlmfast.losses.over_ranks import clip_loss_over_ranks


def test_without_a_group_the_way_out_is_named():
    x = torch.zeros(2, 3)
    for call in (lambda: gather_rows(x), lambda: clip_loss_over_ranks(x, x, 1.0), lambda: Ranks()):
        with pytest.raises(BackendError, match=r"no process group: start the program with torchrun .* world_size=1"):
            call()


class Members:
    """As much of `Ranks` as a plan needs."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def back(self, steps):
        return (self.rank - steps) % self.size


def test_a_large_batch_takes_the_ring(monkeypatch):
    monkeypatch.setattr(distributed, "RING_BYTES", 4 * 10 * 8)
    monkeypatch.setattr(distributed, "RING_ROWS", 16)
    assert type(transport("auto", Members(0, 4), [16, 15, 15, 15], 1)) is Ring
    assert type(transport("auto", Members(0, 3), [16] * 3, 1)) is Gather  # little to hide
    assert type(transport("auto", Members(0, 4), [15] * 4, 1)) is Gather
    assert type(transport("auto", Members(0, 4), [10] * 4, 8)) is Ring
    assert type(transport("auto", Members(0, 4), [10] * 4, 7)) is Gather
    assert type(transport("ring", Members(0, 4), [10] * 4, 1)) is Ring
    assert type(transport("gather", Members(0, 4), [10] * 4, 10**9)) is Gather


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(1, [[1, 2, 3, 4, 5, 6]]), (3, [[1, 2], [3, 4], [5, 6]]), (4, [[1], [2], [3], [4], [5], [6]])],
)
def test_small_blocks_are_joined(monkeypatch, rows, groups):
    monkeypatch.setattr(distributed, "JOIN", 7)
    sizes = [1] * 6 + [rows]  # the largest counts, so that all ranks join alike
    assert [list(group) for group in distributed._groups(sizes, 6)] == groups


def test_importing_the_losses_stays_light():
    """torch.compile's own modules take longer to import than everything else together."""
    code = "import sys, vlmfast.losses; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
