"""Gather against ring: bytes and seconds of the distributed losses on paper, and on a slowed link between processes.

    python benchmarks/train/bench_transport.py --table    # the table of docs/scaling.md
    python benchmarks/train/bench_transport.py --json benchmarks/results/<machine>/<date>-transport.json

The paper is a clock that walks through a transport's schedule, as vlmfast/distributed.py has it: a rank computes, or
waits for its link, which carries one message after the other. The measurement runs the losses themselves in processes
over gloo, where what arrives may not be used before bytes / bandwidth + latency have passed: the simulated link sleeps,
and costs no processor time. Its bytes are counted and compared with the paper's; so are the seconds, for the paper with
those that the loss takes in the same run without the slow link.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from vlmfast import distributed
from vlmfast.bench import machine
from vlmfast.losses.over_ranks import clip_loss_over_ranks, siglip_loss_over_ranks

LOSSES = ("softmax", "sigmoid")
TRANSPORTS = ("gather", "ring")
MIB = 2**20

# ---- on paper --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A loss over ranks, M pairs each, and the seconds that a rank takes for one block [M, M] of the logits."""

    loss: str
    W: int
    M: int
    D: int
    size: int  # bytes of a number
    forward: float
    backward: float  # softmax only: the sigmoid's gradient is made in the forward

    @property
    def rows(self) -> int:
        """Bytes of one rank's rows."""
        return self.M * self.D * self.size

    @property
    def sums(self) -> int:
        """Bytes of one rank's gradient while it is summed, in float32."""
        return self.M * self.D * 4

    @property
    def lses(self) -> int:
        """Bytes of one rank's log-sum-exps, in float64."""
        return self.M * 8

    @property
    def computed(self) -> float:
        """Seconds without any link."""
        return self.W * (self.forward + self.backward)


class Clock:
    """One rank's time. All ranks do the same at the same time, so what this one sends is also what arrives."""

    def __init__(self, bandwidth: float, latency: float) -> None:
        self.bandwidth, self.latency = bandwidth, latency  # bytes a second, seconds a message
        self.now = self.link_free = 0.0
        self.sent = 0

    def send(self, size: int, messages: int = 1) -> float:
        """When as many bytes arrive as are sent now."""
        self.sent += size
        self.link_free = max(self.now, self.link_free) + messages * self.latency + size / self.bandwidth
        return self.link_free

    def compute(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, arrival: float) -> None:
        self.now = max(self.now, arrival)


def gather(clock: Clock, job: Job, rows: int, sums: int, block: float) -> None:
    """All others' rows at once, while the own block is computed; then what was computed of them, all at once."""
    others = job.W - 1
    arriving = clock.send(others * rows, others)
    clock.compute(block)
    clock.wait(arriving)
    clock.compute(others * block)
    clock.wait(clock.send(others * sums, others))


def ring(clock: Clock, job: Job, rows: int, sums: int, block: float) -> None:
    """The next rows come while a block is computed, and the sums of the blocks behind; the last sums go home."""
    arriving = clock.send(rows)
    clock.compute(block)
    total = clock.send(sums)
    last, joined = job.W - 1, max(1, distributed.JOIN // job.M)
    for first in range(1, last + 1, joined):
        steps = range(first, min(first + joined, last + 1))
        for step in steps:
            clock.wait(arriving)
            if step < last:
                arriving = clock.send(rows)
        clock.compute(len(steps) * block)
        for _ in steps:
            clock.wait(total)
            total = clock.send(sums)
    clock.wait(total)


def cost(job: Job, transport: str, bandwidth: float, latency: float) -> Clock:
    """The clock after a forward and a backward."""
    clock = Clock(bandwidth, latency)
    go = {"gather": gather, "ring": ring}[transport]
    if job.loss == "sigmoid":
        go(clock, job, job.rows, job.sums, job.forward)
    else:
        go(clock, job, job.rows, job.lses, job.forward)
        # Gathered rows stay for the backward, and gradients travel in their dtype; on a ring in that of their sum.
        kept = transport == "gather"
        go(clock, job, job.lses + (0 if kept else job.rows), job.rows if kept else job.sums, job.backward)
    return clock


def held(job: Job, transport: str) -> int:
    """Most bytes that a rank holds for the transport, beside its own rows and its results."""
    joined = min(job.W - 1, max(1, distributed.JOIN // job.M))  # blocks that are computed together, once copied for it
    copied = joined if joined > 1 else 0
    if transport == "gather":  # rows, what is computed of them, and what comes home
        return (job.W + copied) * job.rows + 2 * job.W * (job.sums if job.loss == "sigmoid" else job.rows)
    return (joined + copied + 1) * job.rows + 2 * job.sums  # one more block arrives; two sums are on their way


def on_paper(loss: str, W: int, N: int, D: int, flops: float) -> Job:
    """N pairs in bfloat16, computed at that rate: 2 N² D flops for a matrix product over the logits."""
    M = N // W
    product = 2 * M * M * D / flops
    forward, backward = (3 * product, 0.0) if loss == "sigmoid" else (product, 3 * product)
    return Job(loss, W, M, D, 2, forward, backward)


def table(options: argparse.Namespace) -> str:
    """Markdown: what each transport sends and holds, and the seconds for which it keeps a rank waiting."""
    lines = [
        "| loss | ranks | pairs | rows a rank | compute, ms | gather: sent, MiB | held, MiB | waits, ms "
        "| ring: sent, MiB | held, MiB | waits, ms |",
        "|---|" + "---:|" * 10,
    ]
    for loss in LOSSES:
        for N in options.pairs:
            for W in options.ranks:
                job = on_paper(loss, W, N, options.dim, options.tflops * 1e12)
                cells = [loss, W, N, job.M, f"{1e3 * job.computed:.2f}"]
                for transport in TRANSPORTS:
                    clock = cost(job, transport, options.gigabytes * 1e9, options.microseconds * 1e-6)
                    waits = clock.now - job.computed
                    cells += [f"{clock.sent / MIB:.0f}", f"{held(job, transport) / MIB:.0f}", f"{1e3 * waits:.2f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


# ---- on a slowed link ------------------------------------------------------------------------------------------------


class Slowed:
    """torch.distributed, where what arrives may be used only when the link would have brought it."""

    def __init__(self, bandwidth: float, latency: float) -> None:
        self.bandwidth, self.latency, self.link_free, self.received = bandwidth, latency, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def batch_isend_irecv(self, operations: list) -> list:
        size = sum(each.tensor.nbytes for each in operations if each.op is dist.irecv)
        return [_Later(dist.batch_isend_irecv(operations), self._arrival(size, 1))]

    def all_to_all_single(self, output: torch.Tensor, *args: Any, group: Any) -> None:
        W = dist.get_world_size(group)
        arrival = self._arrival(output.nbytes * (W - 1) // W, W - 1)
        dist.all_to_all_single(output, *args, group=group)
        _Later([], arrival).wait()

    def all_gather(self, output: torch.Tensor, own: torch.Tensor, *, group: Any, async_op: bool = False) -> Any:
        if not async_op:  # the ranks' shapes, which the paper leaves out
            return ALL_GATHER(output, own, group=group)
        W = dist.get_world_size(group)
        return _Later([ALL_GATHER(output, own, group=group, async_op=True)], self._arrival(own.nbytes * (W - 1), W - 1))

    def _arrival(self, size: int, messages: int) -> float:
        self.received += size
        start = max(time.perf_counter(), self.link_free)
        self.link_free = start + messages * self.latency + size / self.bandwidth
        return self.link_free


class _Later:
    def __init__(self, works: list, arrival: float) -> None:
        self.works, self.arrival = works, arrival

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))


ALL_GATHER = distributed._all_gather


def seconds_of(loss: str, transport: str, features: list[torch.Tensor], link: Slowed) -> tuple[float, float]:
    """Seconds of a forward and of its backward, on that link."""
    image, text = (x.detach().requires_grad_() for x in features)
    with mock.patch.multiple(distributed, dist=link, _all_gather=link.all_gather):
        dist.barrier()
        start = time.perf_counter()
        if loss == "softmax":
            value = clip_loss_over_ranks(image, text, 20.0, transport=transport, normalize=False)
        else:
            way = "shift" if transport == "ring" else "gather"
            value = siglip_loss_over_ranks(image, text, 20.0, -5.0, transport=way, normalize=False)
        middle = time.perf_counter()
        value.backward()
        return middle - start, time.perf_counter() - middle


def run(rank: int, options: argparse.Namespace, store: str, out: str) -> None:
    """One process of the measurement; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    address = {"init_method": f"file://{store}", "timeout": timedelta(seconds=300)}
    dist.init_process_group("gloo", rank=rank, world_size=options.processes, **address)
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for M in options.rows:
        dtype = getattr(torch, options.dtype)
        features = [
            torch.nn.functional.normalize(torch.randn(M, options.dim, generator=generator), dim=1).to(dtype)
            for _ in "xy"
        ]
        for loss in LOSSES:
            links = [(float("inf"), 0.0), *((b * 1e6, options.milliseconds * 1e-3) for b in options.megabytes)]
            measured: dict[tuple, list] = {}
            for turn in range(options.rounds + 1):  # the first is not counted
                for transport in TRANSPORTS:
                    for bandwidth, latency in links:
                        link = Slowed(bandwidth, latency)
                        seconds = seconds_of(loss, transport, features, link)
                        if turn:
                            measured.setdefault((transport, bandwidth), []).append((*seconds, link.received))
            for (transport, bandwidth), found in measured.items():
                if bandwidth == float("inf"):
                    alone = [statistics.median(each[i] for each in found) for i in (0, 1)]
                    continue
                forward, backward = (alone[0], alone[1] if loss == "softmax" else 0.0)
                W, size = options.processes, dtype.itemsize
                job = Job(loss, W, M, options.dim, size, forward / W, backward / W)
                clock = cost(job, transport, bandwidth, options.milliseconds * 1e-3)
                took = statistics.median(each[0] + each[1] for each in found)
                rows.append(
                    {
                        "loss": loss,
                        "transport": transport,
                        "rows_a_rank": M,
                        "bandwidth_mb_per_s": bandwidth / 1e6,
                        "predicted_sent_bytes": clock.sent,
                        "counted_sent_bytes": found[-1][2],
                        "computed_s": sum(alone),
                        "predicted_waits_s": clock.now - job.computed,
                        "measured_waits_s": took - sum(alone),
                        "predicted_s": clock.now + sum(alone) - job.computed,
                        "measured_s": took,
                    }
                )
    if rank == 0:
        Path(out).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/rows.json"
        torch.multiprocessing.spawn(run, (options, f"{folder}/store", out), nprocs=options.processes)
        return json.loads(Path(out).read_text(encoding="utf-8"))


def shown(rows: list[dict[str, Any]]) -> str:
    """Markdown of a measurement."""
    lines = [
        "| loss | rows a rank | MB/s | transport | sent, MiB: paper | counted | computed, ms "
        "| waits, ms: paper | measured | all, ms: paper | measured | measured / paper |",
        "|---|---:|---:|---|" + "---:|" * 8,
    ]
    for row in rows:
        ms = [1e3 * row[name] for name in ("predicted_waits_s", "measured_waits_s", "predicted_s", "measured_s")]
        lines.append(
            f"| {row['loss']} | {row['rows_a_rank']} | {row['bandwidth_mb_per_s']:.0f} | {row['transport']} "
            f"| {row['predicted_sent_bytes'] / MIB:.3f} | {row['counted_sent_bytes'] / MIB:.3f} "
            f"| {1e3 * row['computed_s']:.0f} | {ms[0]:.0f} | {ms[1]:.0f} | {ms[2]:.0f} | {ms[3]:.0f} "
            f"| {ms[3] / ms[2]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def numbers(kind: type) -> Any:
    return lambda text: [kind(each) for each in text.split(",")]


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    paper = parser.add_argument_group("on paper")
    paper.add_argument("--table", action="store_true", help="print the table of docs/scaling.md, and measure nothing")
    paper.add_argument("--ranks", type=numbers(int), default=[16, 64, 512])
    paper.add_argument("--pairs", type=numbers(int), default=[32768, 262144, 1048576])
    paper.add_argument("--gigabytes", type=float, default=50.0, help="a second, of a rank's link, each way")
    paper.add_argument("--microseconds", type=float, default=20.0, help="of a message")
    paper.add_argument("--tflops", type=float, default=500.0, help="of a rank")
    slow = parser.add_argument_group("on a slowed link")
    slow.add_argument("--processes", type=int, default=2)
    slow.add_argument("--rows", type=numbers(int), default=[512, 1024], help="of a process")
    slow.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    slow.add_argument("--megabytes", type=numbers(float), default=[5.0, 20.0, 100.0], help="a second, each way")
    slow.add_argument("--milliseconds", type=float, default=2.0, help="of a message")
    slow.add_argument("--rounds", type=int, default=5)
    slow.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    options = parsed()
    if options.table:
        print(table(options), end="")
        return 0
    rows = measure(options)
    print(shown(rows), end="")
    if options.json:
        result = {
            "benchmark": "transport",
            "command": " ".join(["python", *sys.argv]),
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "dim": options.dim,
            "dtype": options.dtype,
            "processes": options.processes,
            "latency_ms": options.milliseconds,
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row["predicted_sent_bytes"] != row["counted_sent_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
