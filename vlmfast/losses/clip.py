"""`ClipLoss`, in the place of open_clip's, with its arguments and results."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmfast.errors import BackendError
from vlmfast.losses._replaced import is_ours
from vlmfast.ops import _check
from vlmfast.ops.softmax_loss import clip_loss


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
        if not (is_ours(self, "get_logits", _CLIP_LOGITS) and is_ours(self, "get_ground_truth", _CLIP_LABELS)):
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


def _one_process(name: str, world_size: int) -> None:
    if world_size != 1:
        raise BackendError(
            f"{name}: world_size must be 1, as losses across processes are not part of vlmfast yet; got {world_size}"
        )
