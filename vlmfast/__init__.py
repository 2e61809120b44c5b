"""Fused losses and complete vision-language models, from CLIP to LLaVA: large batches in little memory.

The names below are imported when they are first used: no work happens at import and no device is probed. Models, data,
training and evaluation are packages of their own: `vlmfast.models`, `vlmfast.data`, `vlmfast.train`, `vlmfast.eval`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmfast._version import __version__

if TYPE_CHECKING:
    from vlmfast import backend, errors
    from vlmfast.backend import use_backend
    from vlmfast.losses import ClipLoss, CoCaLoss, DistillClipLoss, InfoNceLoss, SigLipLoss, VseLoss
    from vlmfast.ops import available_backends
    from vlmfast.ops.attention import attention
    from vlmfast.ops.hinge_loss import vse_loss
    from vlmfast.ops.linear_cross_entropy import linear_cross_entropy
    from vlmfast.ops.patch_embedding import interpolate_positions, patch_embed
    from vlmfast.ops.sigmoid_loss import siglip_loss
    from vlmfast.ops.similarity import normalized_similarity, rank_counts, similarity_topk
    from vlmfast.ops.softmax_loss import clip_loss, info_nce_loss

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "InfoNceLoss",
    "SigLipLoss",
    "VseLoss",
    "__version__",
    "attention",
    "available_backends",
    "backend",
    "clip_loss",
    "errors",
    "info_nce_loss",
    "interpolate_positions",
    "linear_cross_entropy",
    "normalized_similarity",
    "patch_embed",
    "rank_counts",
    "siglip_loss",
    "similarity_topk",
    "use_backend",
    "vse_loss",
]

_HOMES = {
    "vlmfast.backend": ("use_backend",),
    "vlmfast.losses": ("ClipLoss", "CoCaLoss", "DistillClipLoss", "InfoNceLoss", "SigLipLoss", "VseLoss"),
    "vlmfast.ops": ("available_backends",),
    "vlmfast.ops.attention": ("attention",),
    "vlmfast.ops.hinge_loss": ("vse_loss",),
    "vlmfast.ops.linear_cross_entropy": ("linear_cross_entropy",),
    "vlmfast.ops.patch_embedding": ("interpolate_positions", "patch_embed"),
    "vlmfast.ops.sigmoid_loss": ("siglip_loss",),
    "vlmfast.ops.similarity": ("normalized_similarity", "rank_counts", "similarity_topk"),
    "vlmfast.ops.softmax_loss": ("clip_loss", "info_nce_loss"),
}


def __getattr__(name: str) -> Any:
    if name in ("backend", "errors"):
        return import_module(f"vlmfast.{name}")
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(home), name)
            return globals()[name]
    raise AttributeError(f"module 'vlmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
