"""Image-text retrieval in both directions, from embeddings, without the matrix of all similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast.errors import DataError, ShapeError
from vlmfast.eval.metrics import mean_rank, median_rank, ranks_from_counts, recall_at_k
from vlmfast.ops.similarity import rank_counts

POSITIVES = 1 << 24  # entries of the list of positives that are held at once


def retrieval_metrics(
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    *,
    image_ids: Tensor | None = None,  # [N]
    text_ids: Tensor | None = None,  # [M]
    ks: tuple[int, ...] = (1, 5, 10),
    ties: str = "mean",
) -> dict[str, float]:
    """Recalls and ranks of finding an image's texts and a text's images, under open_clip's names.

    A query's rank is that of its best positive (several captions of one image: the best counts). Items that score
    exactly the same as it push it back by half their number ("mean", the rank that a random order of equals gives on
    average), by nothing ("optimistic") or by their number ("pessimistic"). open_clip goes by the items' order instead.

    Args:
        image: [N, D] embeddings, any length > 0.
        text: [M, D].
        image_ids: [N] int64; image i and text j belong together where their ids are equal. Default: row numbers.
        text_ids: [M] int64; given if and only if image_ids is.
        ks: the k of each R@k.
        ties: "mean", "optimistic" or "pessimistic".

    Returns:
        "image_to_text_R@1" (in [0, 1]), ..., "image_to_text_median_rank", "image_to_text_mean_rank" (from 1), and the
        same for "text_to_image".

    Raises:
        ShapeError: without ids N differs from M, or ids are not one for each row.
        DataError: only one side has ids, or a query has no positive.
        ValueError: ties is none of the three.

    Source: Faghri et al. 2018, "VSE++", and open_clip `get_clip_metrics`; several positives as in CLIP_benchmark.
    """
    if (image_ids is None) != (text_ids is None):
        raise DataError("retrieval_metrics: image_ids and text_ids go together; give both or neither")
    if image_ids is None or text_ids is None:
        if len(image) != len(text):
            raise ShapeError(
                f"retrieval_metrics: without ids row i of image and text make a pair; got {len(image)} and "
                f"{len(text)} rows. Pass image_ids and text_ids"
            )
        image_ids = text_ids = torch.arange(len(image), device=image.device)
    sides = {"image": (image, image_ids), "text": (text, text_ids)}
    for name, (rows, ids) in sides.items():
        if ids.shape != rows.shape[:1]:
            raise ShapeError(f"retrieval_metrics: {name}_ids must be [{len(rows)}]; got {tuple(ids.shape)}")
    metrics: dict[str, float] = {}
    for query, item in (("image", "text"), ("text", "image")):
        ranks = _ranks(*sides[query], *sides[item], ties)
        name = f"{query}_to_{item}"
        metrics |= {f"{name}_R@{k}": recall_at_k(ranks, k) for k in ks}
        metrics |= {f"{name}_median_rank": median_rank(ranks), f"{name}_mean_rank": mean_rank(ranks)}
    return metrics


def _ranks(query: Tensor, query_ids: Tensor, items: Tensor, item_ids: Tensor, ties: str) -> Tensor:
    """[M] float64: the rank of each query's best positive, some rows at a time where positives are many."""
    query_ids, item_ids = query_ids.to(query.device), item_ids.to(query.device)
    order = item_ids.argsort(stable=True)
    ids = item_ids[order]
    begin, end = torch.searchsorted(ids, query_ids), torch.searchsorted(ids, query_ids, right=True)
    if bool((begin == end).any()):
        row = int((begin == end).nonzero()[0])
        raise DataError(f"retrieval_metrics: query {row} has id {int(query_ids[row])}, which no item has; leave it out")
    most = int((end - begin).max())
    ranks = []
    for rows in torch.arange(len(query), device=query.device).split(max(POSITIVES // most, 1)):
        place = begin[rows, None] + torch.arange(most, device=query.device)  # [rows, most] into order
        inside = place < end[rows, None]
        positives = torch.where(inside, order[place.clamp(max=len(order) - 1)], -1)
        ranks.append(ranks_from_counts(*rank_counts(query[rows], items, positives), ties))
    return torch.cat(ranks)
