"""`CoCaLoss`, in the place of open_clip's, with its arguments and results."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.losses.clip import ClipLoss


class CoCaLoss(ClipLoss):
    """CLIP's loss and a captioner's cross-entropy, each with a weight, in the place of `open_clip.CoCaLoss`.

    Args:
        caption_loss_weight: what the captions' loss is multiplied with.
        clip_loss_weight: what the contrastive loss is multiplied with; 0: it is not computed.
        pad_id: the label that is no word: its positions do not count.
        local_loss: this and the rest as ClipLoss's.
        gather_with_grad: see local_loss.
        cache_labels: see local_loss.
        rank: see local_loss.
        world_size: see local_loss.
        use_horovod: see local_loss.
        group: see local_loss.
        transport: see local_loss.
        uneven: see local_loss.
    Raises: what ClipLoss raises.
    Source: open_clip 3.3.0, loss.py; Yu et al. 2022, eq. 4.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        group: dist.ProcessGroup | None = None,
        transport: str = "auto",
        uneven: bool = False,
    ) -> None:
        options = (group, transport, uneven)
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, *options)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logits: Tensor,  # [B, T, V]
        labels: Tensor,  # [B, T]
        logit_scale: Tensor,  # [] or [1]
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The weighted contrastive loss and the weighted mean cross-entropy of the captions' tokens, in nats.

        Args:
            image_features: [B, D], taken as given: open_clip's models normalise them already.
            text_features: [B, D], row i belongs to image i.
            logits: [B, T, V] of the captioner's words.
            labels: [B, T] int64, the words; those equal to pad_id do not count.
            logit_scale: [] or [1], the multiplier itself (exp already applied).
            output_dict: return {"contrastive_loss": ..., "caption_loss": ...} instead.
        Returns: both losses, [] each, or the dict. With no weight the contrastive one is an int64 0, as in open_clip.
        Raises: what ClipLoss raises.
        """
        if self.clip_loss_weight:
            contrastive = cast(Tensor, super().forward(image_features, text_features, logit_scale))
            contrastive = self.clip_loss_weight * contrastive
        else:
            contrastive = torch.tensor(0, device=logits.device)
        # As rows of words: over [B, V, T], as open_clip has it, cross_entropy takes several times as long on a CPU.
        caption = self.caption_loss(logits.flatten(0, 1), labels.flatten()) * self.caption_loss_weight
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)
