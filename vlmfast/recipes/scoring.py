"""What the commands that score predictions share: their files, and their results on the screen and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfast.eval.predictions import Prediction, group_means, read_predictions, read_references, with_references
from vlmfast.train.checkpoint import replace_text


@dataclass(kw_only=True)
class ScoringFlags:
    """The flags of every command that scores predictions."""

    predictions: Path
    """JSON Lines, one prediction a line: ours (docs/scorers.md), LLaVA's, POPE's; or a list as COCO and VQA take it."""
    references: Path | None = None
    """What is right: COCO's or VQA's annotations, POPE's questions, or lines with "id" and "reference" (default: each
    prediction brings its own)."""
    allow_missing: bool = False
    """Leave out what has a prediction or a reference but not both, instead of refusing."""
    output: Path | None = None
    """Write the results here, as JSON."""
    json: bool = False
    """Print one JSON object."""


def open_scored(flags: ScoringFlags) -> list[Prediction]:
    """The predictions, each with its references; standard error tells how many are left out.

    Args:
        flags: which files.
    Raises:
        DataError: a file cannot be read, or predictions and references do not fit each other.
    """
    predictions = read_predictions(flags.predictions)
    truths = None if flags.references is None else read_references(flags.references)
    whole = with_references(predictions, truths, allow_missing=flags.allow_missing)
    left_out = len(predictions) - len(whole) + (0 if truths is None else len(truths) - len(whole))
    if left_out:
        print(f"left out: {left_out} without a prediction or a reference", file=sys.stderr)
    return whole


def by_group(scores: Mapping[str, Sequence[float]], groups: Sequence[str | None]) -> dict[str, Any]:
    """Means of each score in each group, macro means and worst groups; empty if no item has a group.

    Args:
        scores: score's name -> its values.
        groups: of each item.
    """
    if not any(groups):
        return {}
    means = {name: group_means(values, groups) for name, values in scores.items()}
    count = next(iter(means.values())).count
    return {
        "groups": {
            group: {"items": items} | {name: each.mean[group] for name, each in means.items()}
            for group, items in count.items()
        },
        "macro": {name: each.macro for name, each in means.items()},
        "worst_group": {name: each.worst for name, each in means.items()},
    }


def tell(flags: ScoringFlags, results: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
    """Nothing; prints the results and writes them.

    Args:
        flags: where to.
        results: "items", "metrics" and, as `by_group` gives them, "groups", "macro" and "worst_group".
        lines: more to show on the screen.
    """
    text = json.dumps({"predictions": str(flags.predictions), **results}, ensure_ascii=False)
    if flags.output is not None:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(flags.output, text + "\n")
    if flags.json:
        print(text)
        return
    print(f"{flags.predictions}: {results['items']} predictions")
    for name, value in results["metrics"].items():
        print(f"{name:<24} {_shown(value)}")
    if results.get("groups"):
        _show_groups(results)
    for line in lines:
        print(line)


def _show_groups(results: Mapping[str, Any]) -> None:
    rows = [*results["groups"].items()]
    if "macro" in results:
        rows.append(("mean of groups", {"items": "", **results["macro"]}))
        rows.append(("worst group", {"items": "", **results["worst_group"]}))
    width = max(len(name or "(none)") for name, _ in rows)
    names = ["items", *(name for name, value in rows[0][1].items() if isinstance(value, float))]
    columns = [max(len(name), *(len(_shown(row[name])) for _, row in rows)) for name in names]
    print(f"\n{'group':<{width}}" + "".join(f"  {name:>{w}}" for name, w in zip(names, columns, strict=True)))
    for group, row in rows:
        cells = (f"  {_shown(row[name]):>{w}}" for name, w in zip(names, columns, strict=True))
        print(f"{group or '(none)':<{width}}" + "".join(cells))


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
