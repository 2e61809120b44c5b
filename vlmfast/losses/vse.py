"""`VseLoss`: the hinge losses of VSE and VSE++ as a module."""

from __future__ import annotations

from torch import Tensor, nn

from vlmfast.ops.hinge_loss import vse_loss


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
