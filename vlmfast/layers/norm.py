"""Layer normalisation with float32 statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Rows of `x` with mean 0 and variance 1, times `weight`, plus `bias`; computed in float32 or wider.

    Equals:
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * weight + bias

    Args:
        x: [..., C], any floating dtype; bfloat16 and float16 are widened to float32 and rounded once, at the end.
    Returns: [..., C] in the dtype of `x`.
    Source: Ba et al. 2016; eps 1e-5 and the float32 statistics as in OpenAI's CLIP.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
