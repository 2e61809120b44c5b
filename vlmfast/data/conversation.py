"""Conversations about images: their turns, and LLaVA's JSON format, read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

IMAGE_MARK = "<image>"  # where an image stands in a user's turn

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str  # in a user's turn, IMAGE_MARK marks the place of an image


@dataclass(frozen=True)
class Conversation:
    """Turns about images: a system turn or none, then a user's and an assistant's in alternation."""

    id: str
    images: tuple[str, ...]  # names of the images, such as files, in the order of their marks
    turns: tuple[Turn, ...]


@dataclass(frozen=True, eq=False)
class VlmSample:
    """One conversation and its images: the item of a data set that a vision-language model trains on."""

    conversation: Conversation
    image: Tensor  # [n, 3, H, W] uint8, in the order of the marks; n = 0 for text alone
