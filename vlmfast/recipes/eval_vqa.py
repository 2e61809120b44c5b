"""`vlmfast eval vqa`: exact match and VQA accuracy of answers, anyone's model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmfast.eval.vqa import FEWEST, exact_match, vqa_accuracy
from vlmfast.recipes.scoring import ScoringFlags, by_group, open_scored, tell

POSITIONAL = True  # the predictions are named without a flag


@dataclass(kw_only=True)
class Config(ScoringFlags):
    """Scores answers: exact match, and VQA accuracy where each question has several annotators' answers.

    For example:
        vlmfast eval vqa predictions.jsonl
        vlmfast eval vqa results.json --references v2_mscoco_val2014_annotations.json --rule official

    Where predictions have groups (question families), each is scored too, with the mean over groups and the worst.
    """

    rule: Literal["official", "lavis", "fixed"] = "official"
    """How answers are normalised for VQA accuracy (docs/scorers.md): as the official evaluator does since 2021, as it
    did before and LAVIS and Qwen-VL still do, or without its mistakes."""


def run(config: Config) -> None:
    """Prints the scores, and writes them.

    Args:
        config: the flags.
    Raises:
        DataError: a file cannot be read, or predictions and references do not fit each other.
    """
    scored = open_scored(config)
    each = {"exact_match": [float(exact_match(item.prediction, item.references)) for item in scored]}
    if all(len(item.references) >= FEWEST for item in scored):
        each["vqa_accuracy"] = [vqa_accuracy(item.prediction, item.references, rule=config.rule) for item in scored]
    metrics = {name: sum(values) / len(scored) for name, values in each.items()}
    results = {"items": len(scored), "metrics": metrics, **by_group(each, [item.group for item in scored])}
    tell(config, results)
