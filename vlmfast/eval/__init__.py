"""Evaluation: zero-shot classification, retrieval, and the scores they are made of."""

from vlmfast.eval.embed import embed_images, embed_texts
from vlmfast.eval.metrics import (
    mean_per_class_recall,
    mean_rank,
    median_rank,
    ranks_from_counts,
    recall_at_k,
    topk_accuracy,
)
from vlmfast.eval.retrieval import retrieval_metrics
from vlmfast.eval.zero_shot import zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "embed_images",
    "embed_texts",
    "mean_per_class_recall",
    "mean_rank",
    "median_rank",
    "ranks_from_counts",
    "recall_at_k",
    "retrieval_metrics",
    "topk_accuracy",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
