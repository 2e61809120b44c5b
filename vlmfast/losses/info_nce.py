"""`InfoNceLoss`: InfoNCE as a module, with the keys of one process or of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmfast.distributed import Ranks, gather_rows
from vlmfast.errors import ShapeError
from vlmfast.ops.softmax_loss import info_nce_loss


class InfoNceLoss(nn.Module):
    """InfoNCE with its settings kept: `vlmfast.info_nce_loss` as a module.

    With `gather` the keys of all ranks are every rank's keys, and likewise the queries where columns count. Averaged
    over ranks, as DistributedDataParallel and FSDP do, losses and gradients are those of the whole batch.

    Args:
        positives: "out", "in" or "soft": what several positives of one query mean.
        directions: "rows", "columns" or "both".
        label_smoothing: in [0, 1).
        normalize: divide each row by its length first.
        gather: search the keys of all ranks of the group, which must have as many each.
        group: the process group; None is the default one.
    """

    def __init__(
        self,
        positives: str = "out",
        directions: str = "rows",
        label_smoothing: float = 0.0,
        normalize: bool = True,
        gather: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.positives = positives
        self.directions = directions
        self.label_smoothing = label_smoothing
        self.normalize = normalize
        self.gather = gather
        self.group = group

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        return (
            f"positives={self.positives!r}, directions={self.directions!r}, "
            f"label_smoothing={self.label_smoothing}, normalize={self.normalize}" + ", gather=True" * self.gather
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
            labels: [M] int64, the key of each query, -1 for none; with `gather` a key of this rank.
            offset: without labels or ids, query i belongs to key i + offset; with `gather` of this rank.
            query_ids: [M] int64 group ids; positives have equal ids, on whatever ranks they are.
            key_ids: [N] int64.
        Returns: [] float32 (float64 for float64 embeddings).
        Raises: what `vlmfast.info_nce_loss` raises, and with `gather` what `gather_rows` raises.
        """
        if self.gather:
            return self._loss_over_ranks(query, key, logit_scale, labels, offset, query_ids, key_ids)
        positives = {"labels": labels, "offset": offset, "query_ids": query_ids, "key_ids": key_ids}
        return self._loss(query, key, logit_scale, self.directions, **positives)

    def _loss(
        self, query: Tensor, key: Tensor, logit_scale: Tensor | float, directions: str, **positives: Any
    ) -> Tensor:
        return info_nce_loss(
            query,
            key,
            logit_scale,
            **positives,
            positives=self.positives,
            directions=directions,
            label_smoothing=self.label_smoothing,
            normalize=self.normalize,
        )

    def _loss_over_ranks(
        self,
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor | float,
        labels: Tensor | None,
        offset: int,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
    ) -> Tensor:
        """This rank's queries among all keys, and its keys among all queries, each by numbers that all ranks know."""
        ranks, M, N = Ranks(self.group), len(query), len(key)
        if query_ids is not None or key_ids is not None:
            if query_ids is None or key_ids is None or labels is not None or offset:
                raise ValueError(
                    "InfoNceLoss: give the positives once: by labels, by offset, or by query_ids and key_ids"
                )
        else:
            if offset < 0 or (labels is None and offset + M > N):
                raise ShapeError(f"InfoNceLoss: offset must be in [0, N - M = {N - M}]; got {offset}. Or pass labels")
            first = ranks.rank * N
            key_ids = torch.arange(first, first + N, device=key.device)
            query_ids = key_ids[offset : offset + M] if labels is None else torch.where(labels >= 0, labels + first, -1)
        parts = []
        if self.directions != "columns":
            parts.append(self._rows_over_ranks(ranks, query, key, logit_scale, query_ids, key_ids))
        if self.directions != "rows":
            parts.append(self._rows_over_ranks(ranks, key, query, logit_scale, key_ids, query_ids))
        return sum(parts[1:], parts[0]) / len(parts)

    def _rows_over_ranks(
        self, ranks: Ranks, rows: Tensor, columns: Tensor, logit_scale: Tensor | float, ids: Tensor, column_ids: Tensor
    ) -> Tensor:
        every, every_id = gather_rows(columns, self.group), gather_rows(column_ids[:, None], self.group)[:, 0]
        loss = self._loss(rows, every, logit_scale, "rows", query_ids=ids, key_ids=every_id)
        # The mean runs over rows that have a positive: a rank with more of them counts for more.
        count = torch.isin(ids, every_id).sum().double()
        counts = gather_rows(count.view(1, 1), self.group)
        return loss * (ranks.size * count / counts.sum().clamp_min(1)).to(loss.dtype)
