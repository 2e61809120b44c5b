"""`vlmfast eval pope`: how often a model says that objects are there which are not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmfast.errors import DataError
from vlmfast.eval.pope import pope_scores, says_neither, says_yes
from vlmfast.eval.predictions import Prediction
from vlmfast.recipes.scoring import ScoringFlags, open_scored, tell

POSITIONAL = True  # the predictions are named without a flag


@dataclass(kw_only=True)
class Config(ScoringFlags):
    """Scores answers to "Is there a ... in the image?": accuracy, precision, recall, F1 and the ratio of yes, by POPE.

    For example:
        vlmfast eval pope predictions.jsonl
        vlmfast eval pope answers.jsonl --references coco_pope_adversarial.json --json

    Where predictions have groups (random, popular, adversarial), each is scored too. As in POPE, whatever does not say
    no is a yes; how many of the answers said neither is told.
    """


def run(config: Config) -> None:
    """Prints the scores, and writes them.

    Args:
        config: the flags.
    Raises:
        DataError: a file cannot be read, predictions and references do not fit each other, or a reference is neither
            "yes" nor "no".
    """
    scored = open_scored(config)
    groups: dict[str, list[Prediction]] = {}
    for item in scored:
        groups.setdefault(item.group or "", []).append(item)
    metrics = _scores(scored)
    results: dict[str, Any] = {"items": len(scored), "metrics": metrics}
    if any(groups):
        results["groups"] = {name: {"items": len(items), **_scores(items)} for name, items in sorted(groups.items())}
    if metrics["undefined"]:
        print("no answer, or no truth, is yes: precision or recall is undefined, shown as 0", file=sys.stderr)
    if neither := metrics["neither"]:
        print(f"{neither} of {len(scored)} answers say neither yes nor no; POPE counts them as yes", file=sys.stderr)
    tell(config, results)


def _scores(items: Sequence[Prediction]) -> dict[str, Any]:
    scores = asdict(pope_scores([says_yes(item.prediction) for item in items], [_truth(item) for item in items]))
    return scores | {"neither": sum(says_neither(item.prediction) for item in items)}


def _truth(item: Prediction) -> bool:
    words = {reference.strip().lower() for reference in item.references}
    if words not in ({"yes"}, {"no"}):
        raise DataError(f'id {item.id!r}: the reference must be "yes" or "no"; got {item.references}')
    return words == {"yes"}
