"""The contrastive loss that a command's flags name, of one process's batch or of all ranks'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.data.batch import Batch
from vlmfast.distributed import gather_rows
from vlmfast.errors import DataError
from vlmfast.losses import ClipLoss, SigLipLoss
from vlmfast.ops.softmax_loss import info_nce_loss
from vlmfast.train.step import SplitLoss

Compare = Callable[[Mapping[str, Tensor], Batch], Tensor]


def contrastive(
    *,
    siglip: bool = False,
    positives: str = "pair",
    local_loss: bool = True,
    gather_with_grad: bool = True,
    loss_dist_impl: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
) -> SplitLoss:
    """The loss of a model and a batch, as {"contrastive_loss": []}, in nats; for `plain_step` and `cached_step`.

    With several ranks each compares its own pairs with all ranks' pairs. Averaged over ranks, as DDP and FSDP2 do, the
    gradient is that of one process with all pairs, unless one of the two flags is taken away.

    Args:
        siglip: SigLIP's pairwise sigmoid loss instead of CLIP's softmax. `positives` and the two flags have no effect.
        positives: "pair": each image belongs to its own text alone; "out", "in", "soft": to the texts of all samples of
            its id, see `vlmfast.info_nce_loss`. Then the two flags have no effect.
        local_loss: see `vlmfast.losses.ClipLoss`.
        gather_with_grad: see `vlmfast.losses.ClipLoss`.
        loss_dist_impl: see `vlmfast.losses.SigLipLoss`, dist_impl.
        rank: of this process in the group.
        world_size: ranks in the group.
        group: the process group; None is the default one, if world_size > 1.

    Returns:
        A SplitLoss. With ids, it raises DataError for a batch that has none.
    """
    compare: Compare
    if siglip:
        sigmoid = SigLipLoss(rank=rank, world_size=world_size, dist_impl=loss_dist_impl, group=group)

        def compare(out: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return sigmoid(out["image_features"], out["text_features"], out["logit_scale"], out["logit_bias"])
    elif positives == "pair":
        softmax = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size, group=group)

        def compare(out: Mapping[str, Tensor], batch: Batch) -> Tensor:
            bias = out.get("logit_bias")
            return softmax(out["image_features"], out["text_features"], out["logit_scale"], bias)
    else:

        def compare(out: Mapping[str, Tensor], batch: Batch) -> Tensor:
            loss = _by_ids(out, batch, positives, world_size, group)
            bias = out.get("logit_bias")
            # It changes no softmax; DDP wants every parameter to take part.
            return loss if bias is None else loss + 0.0 * bias.sum()

    return SplitLoss(_embed, lambda outputs, batch: {"contrastive_loss": compare(outputs, batch)})


def _embed(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return model(batch.image, batch.text)


def _by_ids(
    out: Mapping[str, Tensor], batch: Batch, positives: str, world_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The softmax loss whose positives have one id: own images among all texts, and own texts among all images."""
    image, text, scale, ids = out["image_features"], out["text_features"], out["logit_scale"], batch.ids
    options: dict[str, Any] = {"positives": positives, "normalize": False}
    if ids is None:
        raise DataError(f"positives={positives!r} needs batches with ids; use positives='pair'")
    if world_size == 1:
        return info_nce_loss(image, text, scale, query_ids=ids, key_ids=ids, directions="both", **options)
    options |= {"query_ids": ids, "key_ids": gather_rows(ids[:, None], group)[:, 0]}
    per_image = info_nce_loss(image, gather_rows(text, group), scale, **options)
    return (per_image + info_nce_loss(text, gather_rows(image, group), scale, **options)) / 2
