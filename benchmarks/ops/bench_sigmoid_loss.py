"""`siglip_loss` beside its rivals, forward and backward.

Model: 6 * B * B * D flops: one pass, because no logit's gradient needs another logit;
4 * B * D * 4 bytes at the least, both embeddings read and both gradients written. Rivals: vlmfast/bench/providers.py.
"""

import pytest

from vlmfast.bench.providers import PROVIDERS


@pytest.mark.parametrize("B", [64, 256, 1024, 4096])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_siglip_loss(bench_loss, provider, B):
    bench_loss("siglip", provider, B)
