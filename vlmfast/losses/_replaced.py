"""Whether somebody put a method of his own in the place of ours."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_ours(loss: nn.Module, name: str, original: Any) -> bool:
    """Whether a method is the one written above: no subclass's, and none set on the class or on the module."""
    return name not in loss.__dict__ and getattr(type(loss), name) is original
