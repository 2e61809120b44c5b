"""`InfoNceLoss`: InfoNCE as a module."""

from __future__ import annotations

from torch import Tensor, nn

from vlmfast.ops.softmax_loss import info_nce_loss


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
