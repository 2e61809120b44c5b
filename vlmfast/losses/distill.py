"""`DistillClipLoss`, in the place of open_clip's, with its arguments and results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmfast.distributed import Ranks, gather_rows
from vlmfast.errors import ShapeError
from vlmfast.losses._replaced import is_ours
from vlmfast.losses.clip import ClipLoss
from vlmfast.ops import _check
from vlmfast.ops._unit import accumulator

ROWS = 256  # of the teacher's logits that are held at once


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and that of finding what a teacher finds, in the place of `open_clip.DistillClipLoss`.

    Equals open_clip's, without the logit matrices of student and teacher: with P = softmax(teacher's logits) and Q the
    same of the teacher's logits per text, for logits z = s x yᵀ of the student
        distill = -((P * log_softmax(z, 1)).sum(1).mean() + (Q * log_softmax(z.T, 1)).sum(1).mean()) / 2
                = contrastive - s * (((P - eye(B)) @ y * x).sum(1).mean() + ((Q - eye(B)) @ x * y).sum(1).mean()) / 2
    where P @ y is made of some rows of P at a time. Both sums are bilinear in x and y: the forward leaves their
    gradients to the backward, four [B, D] in float32. Differentiable once.

    Over several ranks the rows of all, of student and teacher, are gathered in float32 for the second sum, whatever the
    transport of the first loss; value and gradients are open_clip's for each pair of flags, as ClipLoss's are.

    A subclass or patch that replaces `get_logits`, `get_ground_truth` or `dist_loss` is obeyed: its logits are computed
    as open_clip does, [B, B] and in the dtype that they come in.

    Args: as ClipLoss.
    Raises: what ClipLoss raises.
    Source: open_clip 3.3.0, loss.py.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The mean cross-entropy of the student's rows under the teacher's, of whole logits; `forward` does without.

        Args:
            teacher_logits: [M, N].
            student_logits: [M, N].
        Returns: [].
        """
        return -(teacher_logits.softmax(1) * student_logits.log_softmax(1)).sum(1).mean(0)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [B, D]
        text_features: Tensor,  # [B, D]
        logit_scale: Tensor,  # [] or [1]
        dist_image_features: Tensor,  # [B, E]
        dist_text_features: Tensor,  # [B, E]
        dist_logit_scale: Tensor,  # [] or [1]
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The contrastive loss and the loss of distillation, in nats.

        Args:
            image_features: [B, D] of the student, taken as given: open_clip's models normalise them already.
            text_features: [B, D], row i belongs to image i.
            logit_scale: [] or [1], the student's multiplier itself (exp already applied).
            dist_image_features: [B, E] of the teacher, a constant: it gets no gradient.
            dist_text_features: [B, E], likewise.
            dist_logit_scale: [] or [1], likewise.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...} instead.
        Returns: both losses, [] float32 each, or the dict.
        Raises:
            ShapeError: the teacher has not one row for each of the student's.
            And what ClipLoss raises.
        """
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        methods = (("get_logits", _LOGITS), ("get_ground_truth", _LABELS), ("dist_loss", _DIST_LOSS))
        if not all(is_ours(self, name, original) for name, original in methods):
            contrastive, distill = self._losses_of_own_logits(*student, logit_scale, *teacher, dist_logit_scale)
        else:
            _check_teacher(image_features, *teacher, dist_logit_scale)
            contrastive = self._loss(*student, logit_scale)
            distill = contrastive - logit_scale.reshape(()) * self._excess(*student, *teacher, dist_logit_scale)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    def _excess(self, image: Tensor, text: Tensor, dist_image: Tensor, dist_text: Tensor, scale: Tensor) -> Tensor:
        """The mean of the two sums in `DistillClipLoss`, [], over the columns that this rank's rows meet."""
        dtype, plan = accumulator(image, text), _Plan(scale)
        rows = columns = [x.to(dtype) for x in (image, text, dist_image.detach(), dist_text.detach())]
        if self.world_size > 1:
            ranks = self._ranks()
            sizes = ranks.rows("DistillClipLoss", image, self.uneven)
            plan = _Plan(
                scale,
                offset=sum(sizes[: ranks.rank]),
                weight=ranks.size * len(image) / sum(sizes),
                whole=None if self.local_loss else ranks,
                factor=1.0 if self.local_loss or self.gather_with_grad else 1 / ranks.size,
            )
            constant = self.local_loss and not self.gather_with_grad
            columns = [gather_rows(x.detach() if constant else x, self.group, sizes=sizes) for x in rows]
        per_image = _Excess.apply(rows[0], columns[1], rows[2], columns[3], plan)
        per_text = _Excess.apply(rows[1], columns[0], rows[3], columns[2], plan)
        return (per_image + per_text) / 2

    def _losses_of_own_logits(
        self, image: Tensor, text: Tensor, scale: Tensor, dist_image: Tensor, dist_text: Tensor, dist_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        per_image, per_text = self.get_logits(image, text, scale)
        dist_per_image, dist_per_text = self.get_logits(dist_image, dist_text, dist_scale)
        labels = self.get_ground_truth(image.device, per_image.shape[0])
        cross_entropy = nn.functional.cross_entropy
        contrastive = (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2
        distill = (self.dist_loss(dist_per_image, per_image) + self.dist_loss(dist_per_text, per_text)) / 2
        return contrastive, distill


_LOGITS, _LABELS, _DIST_LOSS = ClipLoss.get_logits, ClipLoss.get_ground_truth, DistillClipLoss.dist_loss


@dataclass(frozen=True)
class _Plan:
    scale: Tensor  # [], the teacher's
    offset: int = 0  # row i's pair is column i + offset
    weight: float = 1.0  # of this rank's mean
    whole: Ranks | None = None  # return the mean over these ranks instead
    factor: float = 1.0  # of the gradients


class _Excess(torch.autograd.Function):
    """mean_i <x_i, sum_j p_ij y_j - y_pair(i)> with p_i = softmax_j(scale <teacher_x_i, teacher_y_j>).

    It is attention, but for the pairs. Made here, the gradients are done when the value is: three products, where
    attention's forward and backward take seven.
    """

    @staticmethod
    def forward(ctx, x, y, teacher_x, teacher_y, plan):  # type: ignore[override]
        dx, dy = x.new_empty(x.shape), y.new_zeros(y.shape) if ctx.needs_input_grad[1] else None
        with torch.autocast(x.device.type, enabled=False):
            teacher_x = plan.scale.to(x.dtype).reshape(()) * teacher_x
            for start in range(0, len(x), ROWS):
                rows = slice(start, start + ROWS)
                p = (teacher_x[rows] @ teacher_y.T).softmax(1)  # [ROWS, N]
                p.diagonal(start + plan.offset).sub_(1)
                torch.mm(p, y, out=dx[rows])
                if dy is not None:
                    dy.addmm_(p.T, x[rows])
        share = plan.weight / len(x)
        value = share * (x * dx).sum()
        ctx.factor = plan.factor
        ctx.save_for_backward(dx.mul_(share), dy if dy is None else dy.mul_(share))
        if plan.whole is not None:
            dist.all_reduce(value, group=plan.whole.group)
            value /= plan.whole.size
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        return *(None if d is None else ctx.factor * grad * d for d in ctx.saved_tensors), None, None, None


def _check_teacher(image: Tensor, dist_image: Tensor, dist_text: Tensor, dist_scale: Tensor) -> None:
    op, teacher = "DistillClipLoss", {"dist_image_features": dist_image, "dist_text_features": dist_text}
    _check.is_matrix(op, **teacher)
    _check.floating(op, **teacher)
    _check.same_shape(op, **teacher)
    _check.is_scalar(op, dist_logit_scale=dist_scale)
    _check.same_device(op, image_features=image, **teacher)
    if len(image) != len(dist_image):
        raise ShapeError(
            f"{op}: dist_image_features must have a row for each row of image_features; got {tuple(dist_image.shape)} "
            f"and {tuple(image.shape)}"
        )
