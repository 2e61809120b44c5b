"""The losses over ranks: on processes of their own, beside one process with the whole batch, in float64."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast import distributed
from vlmfast.losses import over_ranks
from vlmfast.losses.over_ranks import SIGLIP_TRANSPORTS, clip_loss_over_ranks, siglip_loss_over_ranks

DOCUMENT = Path(__file__).parents[2] / "docs/distributed.md"
# Of the flags' four pairs: (length of the towers' gradient over the exact one's at W ranks, whether its direction is).
TABLE = {
    (False, False): (lambda W: 1 / W, True),
    (False, True): (lambda W: 1, True),
    (True, False): (None, False),
    (True, True): (lambda W: 1, True),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The folder of a run of every check on several processes, and what failed."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, ranks.run(folder, [check.__name__ for check in ranks.CHECKS])


@pytest.mark.slow
def test_every_check_on_every_rank(processes):
    _, failures = processes
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("W", ranks.MEMBERS)
def test_which_flags_give_which_gradients(processes, W):
    """The table of docs/distributed.md: after averaging over ranks, beside one process with the whole batch."""
    is_the_table(processes[0], W)


def is_the_table(folder, W, prefix=""):
    """The rows of one library: "open_clip " or ours."""
    found = json.loads((folder / f"table-{W}.json").read_text(encoding="utf-8"))
    for (local_loss, gather_with_grad), (length, right) in TABLE.items():
        towers, cosine, scale = found[f"{prefix}ClipLoss local_loss={local_loss}, gather_with_grad={gather_with_grad}"]
        assert scale == pytest.approx(1, rel=1e-9)
        if right:
            assert (towers, cosine) == pytest.approx((length(W), 1), rel=1e-9)
        else:  # that of the features here: the document has these numbers
            text = DOCUMENT.read_text(encoding="utf-8")
            (said,) = re.findall(r"local_loss=True, gather_with_grad=False\)` \| \*\*(.*)\*\* \| \*\*(.*)\*\* \|", text)
            lengths, cosines = ([float(number) for number in each.split(",")] for each in said)
            which = list(ranks.MEMBERS).index(W)
            assert (towers, cosine) == (
                pytest.approx(lengths[which], abs=6e-3),
                pytest.approx(cosines[which], abs=6e-4),
            )
    for name in SIGLIP_TRANSPORTS:
        assert found[f"SigLipLoss {name}"] == pytest.approx((1, 1, 1), rel=1e-9)
    print(f"\nW = {W}", *(f"{name:62} {a:.4f} {b:.6f} {c:.4f}" for name, (a, b, c) in found.items()), sep="\n")
    return found


@pytest.mark.slow
def test_beside_open_clip_itself(open_clip, tmp_path):
    """Its losses know the default group alone."""
    failures = ranks.run(tmp_path, ["beside_open_clip", "table"])
    assert not failures, "\n\n".join(failures)
    found = is_the_table(tmp_path, ranks.WORLD, "open_clip ")
    for name in [name for name in found if name.startswith("open_clip ")]:
        assert found[name] == pytest.approx(found[name.removeprefix("open_clip ")], rel=1e-9)


@pytest.mark.slow
def test_the_documents_example_says_the_same_on_two_ranks(tmp_path):
    """DistributedDataParallel's own averaging; tests/test_docs.py runs it in one process."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (expected,) = re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "train.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


class Held(TorchDispatchMode):
    """The most bytes that tensors seen inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


class Alone:
    """Rank 0 of W, the only one there is: nothing arrives, but room is made for it as if it did."""

    def __init__(self, W):
        self.group, self.rank, self.size = None, 0, W

    def peer(self, rank):
        return rank % self.size

    def back(self, steps):
        return -steps % self.size

    def rows(self, op, x, uneven=False):
        return [len(x)] * self.size


@pytest.fixture
def peak(monkeypatch):
    """Peak blocks of a loss's forward and backward at 64 rows a rank, had W ranks been there; one block a call."""
    rows, width = 64, 128  # the logits of two blocks are half a block of embeddings
    for name in ("all_to_all_single", "batch_isend_irecv", "broadcast", "reduce"):
        reply = [] if name == "batch_isend_irecv" else SimpleNamespace(wait=lambda: None)
        monkeypatch.setattr(dist, name, lambda *_, reply=reply, **__: reply)
    monkeypatch.setattr(dist, "P2POp", lambda *_: None)
    monkeypatch.setattr(distributed, "_all_gather", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(distributed, "JOIN", 1)

    def measure(loss, W, transport):
        monkeypatch.setattr(over_ranks, "Ranks", lambda group: Alone(W))
        inputs = [torch.randn(rows, width).requires_grad_() for _ in range(2)] + [torch.tensor(10.0)]
        inputs += [torch.tensor(-10.0)] if loss is siglip_loss_over_ranks else []
        with Held() as held:
            loss(*inputs, transport=transport).backward()
        return held.peak / (rows * width * 4)

    return measure


# Blocks of 64 rows that are held in all: two or three of those that travel, as many sums of their gradients, the sum of
# image's gradient and what a backend makes for one block. "bidir" has two rings.
@pytest.mark.parametrize(
    ("loss", "transport", "most"),
    [
        (siglip_loss_over_ranks, "shift", 8),
        (siglip_loss_over_ranks, "reduce", 8),
        (siglip_loss_over_ranks, "bidir", 13),
        (clip_loss_over_ranks, "ring", 8),
    ],
)
def test_what_a_ring_holds_does_not_grow_with_the_world(peak, loss, transport, most):
    peaks = [peak(loss, W, transport) for W in (2, 3, 4, 8, 16, 32)]
    assert peaks == sorted(peaks)
    assert len(set(peaks[-3:])) == 1
    assert round(peaks[-1]) == most, peaks


@pytest.mark.parametrize("loss", [siglip_loss_over_ranks, clip_loss_over_ranks])
def test_gathering_holds_three_buffers_of_all_rows(peak, loss):
    """What RING_BYTES is reckoned with."""
    assert peak(loss, 12, "gather") - peak(loss, 8, "gather") == pytest.approx(3 * 4, abs=0.1)
