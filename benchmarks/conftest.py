"""What the benchmarks share: one thread, and the providers of `vlmfast bench loss` under pytest-benchmark."""

import os

import pytest
import torch

from vlmfast.bench import loss, providers, timing

THREADS = int(os.environ.get("VLMFAST_BENCH_THREADS", "1"))
DIM = 512


@pytest.fixture(autouse=True, scope="session")
def _threads():
    with timing.threads(THREADS):
        yield


@pytest.fixture
def bench_loss(benchmark):
    """Times forward + backward of one provider on B pairs, with the model of its cost beside the time."""

    def run(name, provider, B):
        leaves = loss.pairs(B, DIM, torch.float32, seed=0)
        if provider.startswith("torch-compile"):
            torch.compiler.reset()
        try:
            form, fn = loss.fastest_form(name, provider, leaves)
        except providers.UnavailableError as why:
            pytest.skip(str(why))
        benchmark.group = f"{name}_loss, B={B}, D={DIM}, float32, {THREADS} threads"
        flops = providers.LEAST_FLOPS[name][1] * B * B * DIM
        moved_bytes = 4 * B * DIM * 4  # read both embeddings, write both gradients
        benchmark.extra_info.update(least_flops=flops, least_moved_bytes=moved_bytes, form=form)
        benchmark.pedantic(timing.timed_pass, (loss.bind(fn, leaves), leaves), rounds=7, warmup_rounds=1)
        benchmark.extra_info["gflops"] = flops / benchmark.stats.stats.median / 1e9

    return run
