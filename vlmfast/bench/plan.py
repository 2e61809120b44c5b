"""What a CLIP's step holds in memory, without computing it: bytes counted on tensors that have shapes and no values."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmfast.models import Clip, ClipConfig


class Held(NamedTuple):
    """Bytes of one forward and backward, beside weights, their gradients and the inputs."""

    kept: int  # from forward to backward: activations, and weights that autocast cast
    peak: int  # at the highest moment, what is kept included
    features: int  # of the outputs alone


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside it and are still held, and their highest number."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}  # what is a view of these is nothing new
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._known and storage._cdata not in given:
                self._known.add(storage._cdata)
                self.live += (size := storage.nbytes())
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Towers:
    """A model without values, which tells what it would hold.

    Args:
        config: of the model.
        precision: "fp32" or "amp_bf16".
        tokens: of a caption, at most the context length: their mean, where captions are packed.
    """

    def __init__(self, config: ClipConfig, *, precision: str, tokens: int) -> None:
        self.config, self.precision, self.tokens = config, precision, tokens
        # Where in a causal text the pooled token lies changes no shape, and there are no ids to read it from.
        text_cfg = replace(config.text_cfg, pool_type="last") if config.text_cfg.ends_early else config.text_cfg
        self._mode = FakeTensorMode()
        with self._mode:
            self.model = Clip(replace(config, text_cfg=text_cfg))
            self.model._check_ids = lambda text: None  # type: ignore[method-assign]
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(self.model)]
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.largest_block = max(blocks, default=0)  # parameters
        self.outside_blocks = self.parameters - sum(blocks)  # parameters
        self.held = functools.cache(self._held)

    def _held(self, pairs: int, checkpointing: bool) -> Held:
        with self._mode:
            self.model.set_grad_checkpointing(checkpointing)
            image = torch.empty(pairs, 3, *self.config.vision_cfg.image_hw, dtype=torch.uint8)
            text = torch.empty(pairs, self.tokens, dtype=torch.int64)
            return held(self.model, image, text, self.precision)


def held(model: nn.Module, image: Tensor, text: Tensor, precision: str) -> Held:
    """What one forward and backward of a model holds, whose parameters have a `grad` already.

    Args:
        model: (image, text) -> outputs by name.
        image: [B, 3, H, W]
        text: [B, T], both made outside, and not counted.
        precision: "fp32" or "amp_bf16".
    """
    with Live() as live:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "amp_bf16"):
            outputs: Mapping[str, Tensor] = model(image, text)
        kept = live.live
        torch.autograd.backward(list(outputs.values()), [torch.ones_like(each) for each in outputs.values()])
    return Held(kept, live.peak, sum(each.nbytes for each in outputs.values() if each.dim() == 2))


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers one at a time: the elements of each list of modules."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
