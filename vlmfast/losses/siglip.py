"""`SigLipLoss`, in the place of open_clip's, with its arguments and results."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.distributed import Ranks, gather_rows
from vlmfast.losses._replaced import is_ours
from vlmfast.losses.clip import _even, _place, _ranks
from vlmfast.losses.over_ranks import siglip_loss_over_ranks
from vlmfast.ops import _check
from vlmfast.ops.sigmoid_loss import siglip_loss


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss, in the place of `open_clip.SigLipLoss`.

    Equals open_clip's, in float32 whatever the features' dtype and without the [B, B] logits:
        -F.logsigmoid((2 * eye(B) - 1) * logits).sum() / B

    Over several ranks each returns the loss of its images among the texts of all, as open_clip's does; the mean over
    ranks is the loss of the whole batch, and the gradients, averaged, are its gradients. With every dist_impl but
    "gather" it holds as much for any number of ranks.

    A subclass or patch that replaces `_loss`, `get_logits` or `get_ground_truth` is obeyed. With logits or signs of its
    own the logits are computed as open_clip does, [B, B] and in the dtype that they come in; over several ranks the
    texts of all are then held, whatever the dist_impl.

    Args:
        cache_labels: kept as an attribute; no labels are made, so there is nothing to cache.
        rank: this process's number in the group.
        world_size: of the group; with 1 nothing is sent.
        dist_impl: how texts travel, as in `siglip_loss_over_ranks`: "bidir", "shift", "reduce" or "gather"; None means
            "bidir", as in open_clip.
        chunk_size: kept as an attribute; the logits are never held, in chunks or whole.
        group: the process group; None is the default one. With a group, rank and world_size may be left out.
        uneven: ranks may differ in their numbers of pairs.
    Raises:
        BackendError: when it is called: torch.distributed has not been started, or rank and world_size are not those of
            the group.
        ValueError: dist_impl is unknown, or chunk_size is negative.
    Source: open_clip, loss.py (chunk_size since version 4).
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        group: dist.ProcessGroup | None = None,
        uneven: bool = False,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"SigLipLoss: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather'; got {dist_impl!r}"
            )
        if chunk_size < 0:
            raise ValueError(f"SigLipLoss: chunk_size must be 0 (no chunks) or a number of rows; got {chunk_size}")
        rank, world_size = _place(rank, world_size, group)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.group = group
        self.uneven = uneven
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """The signs of the logits: +1 for a pair, -1 for all else.

        Args:
            device: where the signs lie.
            dtype: of the signs.
            num_logits: the number of rows, B.
            negative_only: -1 everywhere.
        Returns: [B, B].
        """
        signs = torch.full((num_logits, num_logits), -1.0, device=device, dtype=dtype)
        return signs if negative_only else signs.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """The logit matrix, for those who want to look at it; `forward` does without.

        Args:
            image_features: [B, D], as given: not normalised here.
            text_features: [B, D].
            logit_scale: [] or [1], the multiplier itself.
            logit_bias: [] or [1], added to every logit.
        Returns: [B, B].
        """
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The sum of the binary cross-entropies of all pairs of this rank's images, divided by B, in nats.

        Args:
            image_features: [B, D], taken as given: open_clip's models normalise them already.
            text_features: [B, D], row i belongs to image i.
            logit_scale: [] or [1], the multiplier itself (exp already applied).
            logit_bias: [] or [1]; None is 0.
            output_dict: return {"contrastive_loss": loss} instead.
        Returns: [] float32 (a subclass's own logits or signs: in their dtype), or the dict.
        Raises: what `vlmfast.siglip_loss` raises, and what `siglip_loss_over_ranks` raises.
        """
        inputs = (image_features, text_features, logit_scale, logit_bias)
        if self.world_size == 1:
            loss = self._loss(*inputs)
        elif self._is_ours() and is_ours(self, "_loss", _SIGLIP_LOSS):
            self._ranks()
            loss = siglip_loss_over_ranks(
                image_features,
                text_features,
                logit_scale,
                0.0 if logit_bias is None else logit_bias,
                group=self.group,
                transport=self.dist_impl,
                uneven=self.uneven,
                normalize=False,
            )
        else:
            loss = self._loss_of_own_blocks(*inputs)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        logit_bias: Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of one block of pairs; with `negative_only`, of a block without true pairs. open_clip's name."""
        if not self._is_ours():
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            B, device, dtype = image_features.shape[0], image_features.device, image_features.dtype
            signs = self.get_ground_truth(device, dtype, B, negative_only=negative_only)
            return -nn.functional.logsigmoid(signs * logits).sum() / B
        _check.same_shape("SigLipLoss", image_features=image_features, text_features=text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        offset = None if negative_only else 0
        return siglip_loss(image_features, text_features, logit_scale, bias, offset=offset, normalize=False)

    def _loss_of_own_blocks(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        """A subclass's own block loss, of the own texts and of each other rank's."""
        ranks, B = self._ranks(), len(text)
        _even("SigLipLoss", self.uneven)
        others = gather_rows(text, self.group).split(B)
        loss = self._loss(image, text, logit_scale, logit_bias)
        for step in range(1, ranks.size):
            loss = loss + self._loss(image, others[ranks.back(step)], logit_scale, logit_bias, negative_only=True)
        return loss

    def _ranks(self) -> Ranks:
        return _ranks("SigLipLoss", self.group, self.rank, self.world_size)

    def _is_ours(self) -> bool:
        return is_ours(self, "get_logits", _SIGLIP_LOGITS) and is_ours(self, "get_ground_truth", _SIGLIP_SIGNS)


_SIGLIP_LOSS, _SIGLIP_LOGITS, _SIGLIP_SIGNS = SigLipLoss._loss, SigLipLoss.get_logits, SigLipLoss.get_ground_truth
