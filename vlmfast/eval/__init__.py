"""Evaluation: zero-shot classification, retrieval, and scores: of captions, answers, yes-or-no and confidences."""

from vlmfast.eval.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    nll,
    reliability,
    risk_coverage,
)
from vlmfast.eval.caption import bleu, caption_match, chair, cider_d, rouge_l
from vlmfast.eval.embed import embed_images, embed_texts
from vlmfast.eval.metrics import (
    mean_per_class_recall,
    mean_rank,
    median_rank,
    ranks_from_counts,
    recall_at_k,
    topk_accuracy,
)
from vlmfast.eval.pope import pope_scores
from vlmfast.eval.predictions import Prediction, read_predictions, write_predictions
from vlmfast.eval.retrieval import retrieval_metrics
from vlmfast.eval.vqa import exact_match, normalize_answer, vqa_accuracy
from vlmfast.eval.zero_shot import zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "Prediction",
    "bleu",
    "brier_score",
    "caption_match",
    "chair",
    "cider_d",
    "embed_images",
    "embed_texts",
    "exact_match",
    "expected_calibration_error",
    "fit_temperature",
    "mean_per_class_recall",
    "mean_rank",
    "median_rank",
    "nll",
    "normalize_answer",
    "pope_scores",
    "ranks_from_counts",
    "read_predictions",
    "recall_at_k",
    "reliability",
    "retrieval_metrics",
    "risk_coverage",
    "rouge_l",
    "topk_accuracy",
    "vqa_accuracy",
    "write_predictions",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
