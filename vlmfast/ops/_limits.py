"""What a call may cost on a GPU: how float32 is multiplied there, and the bytes that it may take beside its results."""

from __future__ import annotations

import os

PRECISIONS = ("bf16x3", "tf32", "ieee")

PRECISION = os.environ.get("VLMFAST_PRECISION", "ieee" if os.environ.get("TRITON_INTERPRET") == "1" else "bf16x3")
"""Where a call does not say. "bf16x3": float32 as two bfloat16 parts, three products. "tf32": rounded to 11 bits.
"ieee": in float32, without the matrix unit; then gradient tiles of bfloat16 and float16 calls are float32, too."""

MAX_WORKSPACE = int(os.environ.get("VLMFAST_MAX_WORKSPACE", 2**27))
"""Bytes where a call does not say: gradient tiles of 8192 × 8192 in bfloat16."""


def precision(op: str, value: str | None) -> str:
    """The precision of a call, `value` or the default.

    Raises:
        ValueError: it is unknown.
    """
    chosen = PRECISION if value is None else value
    if chosen not in PRECISIONS:
        where = "VLMFAST_PRECISION" if value is None else "precision"
        raise ValueError(f"{op}: {where} must be one of {', '.join(map(repr, PRECISIONS))}; got {chosen!r}")
    return chosen


def workspace(op: str, value: int | None) -> int:
    """The bytes that a call may take, `value` or the default.

    Raises:
        ValueError: it is negative.
    """
    chosen = MAX_WORKSPACE if value is None else value
    if chosen < 0:
        raise ValueError(f"{op}: max_workspace must be a number of bytes, at least 0; got {chosen}")
    return chosen
