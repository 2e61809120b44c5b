"""The losses as modules. `ClipLoss` and `SigLipLoss` take the place of open_clip's, with its arguments and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.errors import BackendError
from vlmfast.ops import _check
from vlmfast.ops.hinge_loss import vse_loss
from vlmfast.ops.sigmoid_loss import siglip_loss
from vlmfast.ops.softmax_loss import clip_loss, info_nce_loss


class ClipLoss(nn.Module):
    """CLIP's symmetric loss, in the place of `open_clip.ClipLoss`.

    Equals open_clip's, in float32 whatever the features' dtype and without the two [B, B] logit matrices:
        (F.cross_entropy(per_image, arange(B)) + F.cross_entropy(per_text, arange(B))) / 2

    A subclass or patch that replaces `get_logits` or `get_ground_truth` is obeyed: its logits are computed as open_clip
    does, [B, B] and in the dtype that they come in.

    Args:
        local_loss: with world_size 1 without effect, as are gather_with_grad and rank.
        gather_with_grad: see local_loss.
        cache_labels: keep the labels that `get_ground_truth` makes, by device.
        rank: see local_loss.
        world_size: 1.
        use_horovod: False.
    Raises:
        BackendError: world_size is not 1, or use_horovod is true.
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
    ) -> None:
        super().__init__()
        _one_process("ClipLoss", world_size)
        if use_horovod:
            raise BackendError("ClipLoss: use_horovod=True is not supported; use torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The label of each row: its own number.

        Args:
            device: where the labels lie.
            num_logits: the number of rows, B.
        Returns: [B] int64.
        """
        if device in self.labels and len(self.labels[device]) == num_logits:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
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
        Returns: logits per image [B, B] and logits per text [B, B].
        """
        per_image = logit_scale * image_features @ text_features.T
        per_text = logit_scale * text_features @ image_features.T
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
        Raises: what `vlmfast.clip_loss` raises.
        """
        if not (_is(self, "get_logits", _CLIP_LOGITS) and _is(self, "get_ground_truth", _CLIP_LABELS)):
            loss = self._loss_of_own_logits(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = clip_loss(image_features, text_features, logit_scale, normalize=False)
            if isinstance(logit_bias, Tensor):
                _check.is_scalar("ClipLoss", logit_bias=logit_bias)
                loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss_of_own_logits(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        bias = {} if logit_bias is None else {"logit_bias": logit_bias}
        per_image, per_text = self.get_logits(image, text, logit_scale, **bias)
        labels = self.get_ground_truth(image.device, per_image.shape[0])
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


_CLIP_LOGITS, _CLIP_LABELS = ClipLoss.get_logits, ClipLoss.get_ground_truth


class InfoNceLoss(nn.Module):
    """InfoNCE with its settings kept: `vlmfast.info_nce_loss` as a module.

    Args:
        positives: "out", "in" or "soft": what several positives of one query mean.
        directions: "rows", "columns" or "both".
        label_smoothing: in [0, 1).
        normalize: divide each row by its length first.
    """

    def __init__(
        self,
        positives: str = "out",
        directions: str = "rows",
        label_smoothing: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.positives = positives
        self.directions = directions
        self.label_smoothing = label_smoothing
        self.normalize = normalize

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return (
            f"positives={self.positives!r}, directions={self.directions!r}, "
            f"label_smoothing={self.label_smoothing}, normalize={self.normalize}"
        )

    def forward(
        self,
        query: Tensor,  # [M, D]
        key: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        labels: Tensor | None = None,  # [M]
        *,
        offset: int = 0,
        query_ids: Tensor | None = None,  # [M]
        key_ids: Tensor | None = None,  # [N]
    ) -> Tensor:
        """The mean cross-entropy of finding each query's positives among the keys, in nats.

        Args:
            query: [M, D] embeddings.
            key: [N, D] embeddings.
            logit_scale: [] or [1], the multiplier itself; or a number.
            labels: [M] int64, the key of each query, -1 for none.
            offset: without labels or ids, query i belongs to key i + offset.
            query_ids: [M] int64 group ids; positives have equal ids.
            key_ids: [N] int64.
        Returns: [] float32 (float64 for float64 embeddings).
        Raises: what `vlmfast.info_nce_loss` raises.
        """
        return info_nce_loss(
            query,
            key,
            logit_scale,
            labels,
            offset=offset,
            query_ids=query_ids,
            key_ids=key_ids,
            positives=self.positives,
            directions=self.directions,
            label_smoothing=self.label_smoothing,
            normalize=self.normalize,
        )


class SigLipLoss(nn.Module):
    """SigLIP's pairwise sigmoid loss, in the place of `open_clip.SigLipLoss`.

    Equals open_clip's, in float32 whatever the features' dtype and without the [B, B] logits:
        -F.logsigmoid((2 * eye(B) - 1) * logits).sum() / B

    A subclass or patch that replaces `_loss`, `get_logits` or `get_ground_truth` is obeyed. With logits or signs of its
    own, or with `negative_only`, the logits are computed as open_clip does, [B, B] and in the dtype that they come in.

    Args:
        cache_labels: kept as an attribute; no labels are made, so there is nothing to cache.
        rank: with world_size 1 without effect, as is dist_impl.
        world_size: 1.
        dist_impl: None, "bidir", "shift", "reduce" or "gather"; None means "bidir", as in open_clip.
        chunk_size: kept as an attribute; the logits are never held, in chunks or whole.
    Raises:
        BackendError: world_size is not 1.
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
    ) -> None:
        super().__init__()
        _one_process("SigLipLoss", world_size)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"SigLipLoss: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather'; got {dist_impl!r}"
            )
        if chunk_size < 0:
            raise ValueError(f"SigLipLoss: chunk_size must be 0 (no chunks) or a number of rows; got {chunk_size}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
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
        """The sum of the binary cross-entropies of all pairs, divided by B, in nats.

        Args:
            image_features: [B, D], taken as given: open_clip's models normalise them already.
            text_features: [B, D], row i belongs to image i.
            logit_scale: [] or [1], the multiplier itself (exp already applied).
            logit_bias: [] or [1]; None is 0.
            output_dict: return {"contrastive_loss": loss} instead.
        Returns: [] float32 (a subclass's own logits or signs: in their dtype), or the dict.
        Raises: what `vlmfast.siglip_loss` raises.
        """
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
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
        ours = _is(self, "get_logits", _SIGLIP_LOGITS) and _is(self, "get_ground_truth", _SIGLIP_SIGNS)
        if negative_only or not ours:
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            B, device, dtype = image_features.shape[0], image_features.device, image_features.dtype
            signs = self.get_ground_truth(device, dtype, B, negative_only=negative_only)
            return -nn.functional.logsigmoid(signs * logits).sum() / B
        bias = 0.0 if logit_bias is None else logit_bias
        return siglip_loss(image_features, text_features, logit_scale, bias, normalize=False)


_SIGLIP_LOGITS, _SIGLIP_SIGNS = SigLipLoss.get_logits, SigLipLoss.get_ground_truth


class VseLoss(nn.Module):
    """The hinge losses of VSE and VSE++ with their settings kept: `vlmfast.vse_loss` as a module.

    Args:
        margin: how much more similar a true pair must be than a foreign one, >= 0.
        hardest: count only the worst foreigner of each row and column (VSE++, its code's `max_violation`).
        normalize: divide each row by its length first. False takes rows as given, as the papers' code does.
        reduction: "sum" over the batch, as in the papers, or "mean", which divides it by B. A learning rate tuned for
            one does not fit the other.
    Raises:
        ValueError: reduction is neither "sum" nor "mean".
    """

    def __init__(
        self, margin: float = 0.2, hardest: bool = False, normalize: bool = True, reduction: str = "sum"
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"VseLoss: reduction must be 'sum' or 'mean'; got {reduction!r}")
        self.margin = margin
        self.hardest = hardest
        self.normalize = normalize
        self.reduction = reduction

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return f"margin={self.margin}, hardest={self.hardest}, normalize={self.normalize}, reduction={self.reduction!r}"

    def forward(
        self,
        image: Tensor,  # [B, D]
        text: Tensor,  # [B, D]
    ) -> Tensor:
        """How far foreign pairs come within the margin of the true ones, in both directions.

        Args:
            image: [B, D] embeddings.
            text: [B, D], row i belongs to image i.
        Returns: [] float32 (float64 for float64 embeddings).
        Raises: what `vlmfast.vse_loss` raises.
        """
        loss = vse_loss(image, text, self.margin, hardest=self.hardest, normalize=self.normalize)
        return loss / image.shape[0] if self.reduction == "mean" else loss


def _one_process(name: str, world_size: int) -> None:
    if world_size != 1:
        raise BackendError(
            f"{name}: world_size must be 1, as losses across processes are not part of vlmfast yet; got {world_size}"
        )


def _is(loss: nn.Module, name: str, original: Any) -> bool:
    """Whether a method is the one written above: no subclass's, and none set on the class or on the module."""
    return name not in loss.__dict__ and getattr(type(loss), name) is original
