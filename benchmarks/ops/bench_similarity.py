"""Similarity, top-k and ranks beside plain PyTorch.

Model: 2 * M * N * D flops each. Bytes: both embeddings read; `normalized_similarity` writes the [M, N] matrix, the
others [M, k] and [M]. Rivals: the matrix and then topk or comparisons, whole or over chunks of queries.
"""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.ops.similarity import normalized_similarity, rank_counts, similarity_topk

D, K, CHUNK = 512, 10, 512


def eager_similarity(query, items):
    return F.normalize(query, dim=1) @ F.normalize(items, dim=1).T


def eager_topk(query, items):
    return eager_similarity(query, items).topk(K, dim=1)


def eager_ranks(query, items, positives):
    s = eager_similarity(query, items)
    best = s.gather(1, positives[:, None])
    return (s > best).sum(1), (s == best).sum(1) - 1


def chunked(fn):
    """`fn` over chunks of queries, so that it holds [CHUNK, N] at a time."""

    def run(query, items, *per_query):
        items = F.normalize(items, dim=1)
        parts = zip(query.split(CHUNK), *(each.split(CHUNK) for each in per_query), strict=True)
        return [torch.cat(out) for out in zip(*(fn(part[0], items, *part[1:]) for part in parts), strict=True)]

    return run


SIMILARITY = {"vlmfast": normalized_similarity, "eager": eager_similarity}
TOPK = {
    "vlmfast": lambda query, items: similarity_topk(query, items, K),
    "eager": eager_topk,
    "eager, chunked": chunked(eager_topk),
}
RANKS = {"vlmfast": rank_counts, "eager": eager_ranks, "eager, chunked": chunked(eager_ranks)}


@pytest.fixture
def time_it(benchmark):
    """Times a call on M queries and N items, with its flops."""

    def run(name, call, M, N, *more):
        generator = torch.Generator().manual_seed(0)
        query, items = torch.randn(M, D, generator=generator), torch.randn(N, D, generator=generator)
        benchmark.group = f"{name}, M={M}, N={N}, D={D}, float32"
        benchmark.extra_info.update(least_flops=2 * M * N * D, least_moved_bytes=4 * (M + N) * D)
        with torch.no_grad():
            benchmark.pedantic(call, (query, items, *more), rounds=7, warmup_rounds=1)
        benchmark.extra_info["gflops"] = 2 * M * N * D / benchmark.stats.stats.median / 1e9

    return run


SIZES = pytest.mark.parametrize(("M", "N"), [(256, 1024), (1000, 5000), (4096, 4096)])


@SIZES
@pytest.mark.parametrize("provider", SIMILARITY)
def bench_normalized_similarity(time_it, provider, M, N):
    time_it("normalized_similarity", SIMILARITY[provider], M, N)


@SIZES
@pytest.mark.parametrize("provider", TOPK)
def bench_similarity_topk(time_it, provider, M, N):
    time_it(f"similarity_topk, k={K}", TOPK[provider], M, N)


@SIZES
@pytest.mark.parametrize("provider", RANKS)
def bench_rank_counts(time_it, provider, M, N):
    time_it("rank_counts", RANKS[provider], M, N, torch.arange(M))
