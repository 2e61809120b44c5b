"""Sequences of several lengths, one after the other in one stream of tokens: which token comes from where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def looked_into(*modules: nn.Module) -> bool:
    """Whether a forward hook sits on one of `modules` or a part of one: its owner expects all tokens, [B, T, C]."""
    return any(part._forward_hooks or part._forward_pre_hooks for module in modules for part in module.modules())


class Packing(NamedTuple):
    """Where the tokens of B sequences lie in a packed stream, and where each came from."""

    rows: Tensor  # [tokens] int64, which sequence a token belongs to
    places: Tensor  # [tokens] int64, its place in that sequence
    cu_seqlens: Tensor  # [B + 1] int32, where sequences end, in the order of the stream
    max_seqlen: int
    last: Tensor  # [B] int64, where in the stream the last token of sequence b lies


def pack(lengths: Tensor) -> Packing | None:
    """How to pack the first lengths[b] tokens of each row of a padded batch, short sequences first.

    Equals, of padded tokens [B, T, C]:
        stream = padded[packing.rows, packing.places]        # [tokens, C]
        stream[packing.last] == padded[arange(B), lengths - 1]

    Sequences of one length lie side by side, as `vlmfast.attention` likes them on the CPU. On a GPU this waits for the
    device once, for the number of tokens and the longest length; all else stays there.

    Args:
        lengths: [B] int64, each at least 1.
    Returns: the packing, or None where padding to the longest adds less than an eighth: a dense batch is as good then.
    """
    total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
    if 8 * len(lengths) * longest < 9 * total:
        return None
    lengths, order = lengths.sort(stable=True)
    ends = lengths.cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0))
    rows = order.repeat_interleave(lengths, output_size=total)
    places = torch.arange(total, device=ends.device) - cu_seqlens[:-1].repeat_interleave(lengths, output_size=total)
    last = torch.empty_like(ends).scatter_(0, order, ends - 1)
    return Packing(rows, places, cu_seqlens.int(), longest, last)
