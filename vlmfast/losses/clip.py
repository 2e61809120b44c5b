"""`ClipLoss`, in the place of open_clip's, with its arguments and results."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.distributed import Ranks, gather_rows
from vlmfast.errors import BackendError
from vlmfast.losses._replaced import is_ours
from vlmfast.losses.over_ranks import clip_loss_over_ranks
from vlmfast.ops import _check
from vlmfast.ops.softmax_loss import clip_loss, info_nce_loss


class ClipLoss(nn.Module):
    """CLIP's symmetric loss, in the place of `open_clip.ClipLoss`.

    Equals open_clip's, in float32 whatever the features' dtype and without the two [B, B] logit matrices:
        (F.cross_entropy(per_image, arange(B)) + F.cross_entropy(per_text, arange(B))) / 2

    Over several ranks it means what open_clip's means with the same flags, and is averaged alike by
    DistributedDataParallel and FSDP (docs/distributed.md has the table). local_loss and gather_with_grad together are
    the exact loss, and cost least; without gather_with_grad the gradient is biased, and a warning says how.

    A subclass or patch that replaces `get_logits` or `get_ground_truth` is obeyed: its logits are computed as open_clip
    does, [B, B] and in the dtype that they come in.

    Args:
        local_loss: with several ranks, each returns the loss of its own rows, not that of all; their mean is that.
        gather_with_grad: with several ranks, the gradient passes through the features that came from others.
        cache_labels: keep the labels that `get_ground_truth` makes, by device.
        rank: this process's number in the group.
        world_size: of the group; with 1 nothing is sent, and the flags above have no effect.
        use_horovod: False.
        group: the process group; None is the default one. With a group, rank and world_size may be left out.
        transport: "auto", "gather" or "ring", as in `clip_loss_over_ranks`.
        uneven: ranks may differ in their numbers of pairs.
    Raises:
        BackendError: use_horovod is true; or, when it is called, torch.distributed has not been started, or rank and
            world_size are not those of the group.
        ValueError: transport is unknown.
    Source: open_clip 3.3.0, loss.py.
    """

    def __init__(
        self,
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
        super().__init__()
        if use_horovod:
            raise BackendError("ClipLoss: use_horovod=True is not supported; use torch.distributed")
        if transport not in ("auto", "gather", "ring"):
            raise ValueError(f"ClipLoss: transport must be 'auto', 'gather' or 'ring'; got {transport!r}")
        rank, world_size = _place(rank, world_size, group)
        if world_size > 1 and not gather_with_grad:
            warnings.warn(_BIAS[local_loss], stacklevel=2)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.group = group
        self.transport = transport
        self.uneven = uneven
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The label of each row: its own number; with local_loss that of its column among all ranks'.

        Args:
            device: where the labels lie.
            num_logits: the number of rows, B.
        Returns: [B] int64.
        """
        if device in self.labels and len(self.labels[device]) == num_logits:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two logit matrices, for those who want to look at them; `forward` does without.

        Args:
            image_features: [B, D], as given: not normalised here.
            text_features: [B, D].
            logit_scale: [] or [1], the multiplier itself.
            logit_bias: [] or [1], added to every logit.
        Returns: logits per image and logits per text: [B, B], of several ranks [W B, W B], and with local_loss
            [B, W B].
        """
        all_image, all_text = image_features, text_features
        if self.world_size > 1:
            all_image, all_text = self._gathered(image_features), self._gathered(text_features)
        rows = (image_features, text_features) if self.local_loss else (all_image, all_text)
        per_image = logit_scale * rows[0] @ all_text.T
        per_text = logit_scale * rows[1] @ all_image.T
        if logit_bias is not None:
            per_image = per_image + logit_bias
            per_text = per_text + logit_bias
        return per_image, per_text

    def forward(
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean symmetric cross-entropy, in nats.

        Args:
            image_features: [B, D], taken as given: open_clip's models normalise them already.
            text_features: [B, D], row i belongs to image i.
            logit_scale: [] or [1], the multiplier itself (exp already applied).
            logit_bias: [] or [1]. A bias changes no softmax; it gets a gradient of zero, so that
                DistributedDataParallel finds it used.
            output_dict: return {"contrastive_loss": loss} instead.
        Returns: [] float32 (a subclass's own logits: as cross_entropy returns it), or the dict.
        Raises: what `vlmfast.clip_loss` raises, and what `clip_loss_over_ranks` raises.
        """
        if not (is_ours(self, "get_logits", _CLIP_LOGITS) and is_ours(self, "get_ground_truth", _CLIP_LABELS)):
            loss = self._loss_of_own_logits(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._loss(image_features, text_features, logit_scale)
            if isinstance(logit_bias, Tensor):
                _check.is_scalar("ClipLoss", logit_bias=logit_bias)
                loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        if self.world_size == 1:
            return clip_loss(image, text, logit_scale, normalize=False)
        ranks = self._ranks()
        if self.local_loss and not self.gather_with_grad:
            return self._loss_of_rows(ranks, image, text, logit_scale)
        return clip_loss_over_ranks(
            image,
            text,
            logit_scale,
            group=self.group,
            transport=self.transport,
            uneven=self.uneven,
            normalize=False,
            whole=not self.local_loss,
            # open_clip's gradient ends at the ranks that features came from; averaging then divides it by W once more.
            tower_factor=1.0 if self.gather_with_grad else 1 / self.world_size,
        )

    def _loss_of_rows(self, ranks: Ranks, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        """local_loss without gather_with_grad: each side's rows among the other's, which get no gradient at all."""
        sizes = ranks.rows("ClipLoss", text, self.uneven)
        with torch.no_grad():
            all_image, all_text = (gather_rows(side, self.group, sizes=sizes) for side in (image, text))
        offset = sum(sizes[: ranks.rank])
        per_image = info_nce_loss(image, all_text, logit_scale, offset=offset, normalize=False)
        per_text = info_nce_loss(text, all_image, logit_scale, offset=offset, normalize=False)
        return ranks.size * len(image) / sum(sizes) * (per_image + per_text) / 2

    def _ranks(self) -> Ranks:
        return _ranks("ClipLoss", self.group, self.rank, self.world_size)

    def _gathered(self, features: Tensor) -> Tensor:
        """The features of all ranks, with the gradient that the flags give them."""
        ranks = self._ranks()
        _even("ClipLoss", self.uneven)
        if self.gather_with_grad:
            return gather_rows(features, self.group)
        with torch.no_grad():
            every = gather_rows(features, self.group)
        if self.local_loss:
            return every
        B = len(features)
        return torch.cat([every[: ranks.rank * B], features, every[(ranks.rank + 1) * B :]])

    def _loss_of_own_logits(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        bias = {} if logit_bias is None else {"logit_bias": logit_bias}
        per_image, per_text = self.get_logits(image, text, logit_scale, **bias)
        labels = self.get_ground_truth(image.device, per_image.shape[0])
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


_CLIP_LOGITS, _CLIP_LABELS = ClipLoss.get_logits, ClipLoss.get_ground_truth
_BIAS = {  # by local_loss, without gather_with_grad
    False: "ClipLoss: local_loss=False with gather_with_grad=False, as in open_clip, gives the towers 1 / world_size "
    "of their gradient, and logit_scale the whole. Pass local_loss=True, gather_with_grad=True for the exact gradient",
    True: "ClipLoss: local_loss=True without gather_with_grad, as in open_clip, leaves out what other ranks' losses "
    "say of this rank's features: another direction than the gradient's. Pass gather_with_grad=True for the exact one",
}


def _place(rank: int, world_size: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world_size), the group's where they were left out."""
    if group is None or world_size != 1:
        return rank, world_size
    ranks = Ranks(group)
    return ranks.rank, ranks.size


def _even(name: str, uneven: bool) -> None:
    if uneven:
        raise BackendError(
            f"{name}: with get_logits, get_ground_truth or _loss of your own all ranks must have as many rows, as in "
            "open_clip: leave out uneven=True and drop the last, smaller batch"
        )


def _ranks(name: str, group: dist.ProcessGroup | None, rank: int, world_size: int) -> Ranks:
    """The group of a loss, if it is the one that its rank and world_size speak of."""
    ranks = Ranks(group)
    if (rank, world_size) != (ranks.rank, ranks.size):
        raise BackendError(
            f"{name}: rank={rank} and world_size={world_size} were given, but this process is rank {ranks.rank} of "
            f"{ranks.size} in the process group; pass those numbers, or the group that you mean as group="
        )
    return ranks
