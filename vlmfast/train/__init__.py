"""Training: one step, the loop around it, and what it leaves on the disk."""

from vlmfast.train.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
)
from vlmfast.train.log import read_metrics
from vlmfast.train.loop import evaluate, fit
from vlmfast.train.optim import adamw, parameter_groups
from vlmfast.train.schedule import warmup_constant, warmup_cosine
from vlmfast.train.step import NonFiniteError, SplitLoss, SummedLoss, accumulated_step, cached_step, plain_step

__all__ = [
    "NonFiniteError",
    "SplitLoss",
    "SummedLoss",
    "accumulated_step",
    "adamw",
    "cached_step",
    "checkpoints",
    "evaluate",
    "fit",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "parameter_groups",
    "plain_step",
    "read_metrics",
    "read_state",
    "save_checkpoint",
    "warmup_constant",
    "warmup_cosine",
]
