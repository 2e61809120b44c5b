"""A model's embeddings of many images and texts, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from vlmfast.errors import DataError

Tokenizer = Callable[[list[str]], Tensor]  # B texts -> [B, T] int64


class TwoTowers(Protocol):
    """What evaluation needs of a model; every nn.Module with the two encoders is one."""

    training: bool

    def train(self, mode: bool = True) -> object: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def encode_image(self, image: Tensor, /) -> Tensor: ...

    def encode_text(self, text: Tensor, /) -> Tensor: ...


def embed_images(model: TwoTowers, images: Iterable[Tensor]) -> Tensor:
    """The embeddings of all images, not normalised.

    Args:
        model: its `encode_image` takes [B, 3, H, W]; it runs in evaluation mode, without gradients.
        images: batches [B, 3, H, W], on any device.

    Returns:
        [N, D] float32, on the model's device.

    Raises:
        DataError: there is nothing to embed.
    """
    with evaluating(model) as device:
        return _join("embed_images", [model.encode_image(batch.to(device)).float() for batch in images])


def embed_texts(model: TwoTowers, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """The embeddings of all texts, not normalised.

    Args:
        model: its `encode_text` takes [B, T] int64; it runs in evaluation mode, without gradients.
        tokenizer: maps B texts to int64 [B, T].
        texts: N texts.
        batch_size: texts at a time.

    Returns:
        [N, D] float32, on the model's device.

    Raises:
        DataError: there is nothing to embed.
    """
    chunks = (list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size))
    with evaluating(model) as device:
        return _join("embed_texts", [model.encode_text(tokenizer(chunk).to(device)).float() for chunk in chunks])


@contextmanager
def evaluating(model: TwoTowers) -> Iterator[torch.device]:
    """The model's device; inside the block the model is in evaluation mode and nothing keeps a graph.

    Args:
        model: its mode is as before when the block ends.

    Yields:
        The device of the model's first parameter.
    """
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def _join(name: str, rows: list[Tensor]) -> Tensor:
    if not rows:
        raise DataError(f"{name}: needs at least one image or text; got none")
    return torch.cat(rows)
