"""Any hidden state of a model by its name, while the model runs as it always does."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from vlmfast.errors import VlmfastError


class TapError(VlmfastError, KeyError):
    """A tap was asked for under a name that no module of the model bears; the message has the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def taps(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules return, by name, as the model's last call inside the block left it.

    Equals, for each name:
        model.get_submodule(name).register_forward_hook(lambda m, args, out: hidden.__setitem__(name, out))

    The text tower then computes every text up to the longest one, [B, T, C], instead of packing them. Tensors keep
    their graph: what is computed from them has gradients. With gradient checkpointing, take none from inside a block.

    Args:
        model: a `Clip`, an `Align`, or any module.
        names: of modules, as `model.named_modules()` has them: "visual.transformer.resblocks.3" is the image tower's
            fourth block [B, 1 + P, C], "visual.ln_pre" what the first one takes, "transformer.resblocks.0.attn"
            [B, T, C] the first attention of the text tower, "visual.layer4" a ResNet's last map [B, C, H, W].
    Yields: a dict that the model's calls fill.
    Raises:
        TapError: a name is no module's.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0)
            raise TapError(f"taps: the model has no module {name!r}; nearest: {', '.join(near)}")
    hidden: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        hidden[name] = output

    handles = [
        known[name].register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()
