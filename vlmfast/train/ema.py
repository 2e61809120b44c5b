"""An exponential mean of the weights, which often scores better than the last ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Weights that follow a model's: after each step ema = d ema + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)).

    t counts the steps, so that the first weights do not weigh on a short run. On ranks that hold parts of the
    parameters each rank keeps the mean of its parts.

    Args:
        model: at its start; plain, or sharded by FSDP2.
        decay: 0 <= decay < 1, such as 0.9999.

    Attributes:
        tensors: name -> mean, for everything in the model's state_dict; what is no floating point is as in the model.

    Raises:
        ValueError: the decay is outside of its range.

    Source: the ramp is that of TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Ema: decay must be at least 0 and less than 1; got {decay}")
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: x.detach().clone() for name, x in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after `step` steps.

        Args:
            model: the same one.
            step: how many steps it has taken.
        """
        pairs = [(_local(self.tensors[name]), _local(x)) for name, x in model.state_dict().items()]
        moving = [(mean, x) for mean, x in pairs if mean.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)([mean for mean, _ in moving], [x for _, x in moving], step)
        for mean, x in pairs:
            if not mean.is_floating_point():
                mean.copy_(x)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
