"""Predictions and references in files, of anyone's model: what the scorers read.

One object a line, of which only "id" and "prediction" must be there:
    {"id": "17", "task": "vqa", "input": {"question": "..."}, "prediction": "two", "probs": {"two": 0.7, "one": 0.3},
     "reference": ["two"], "group": "count", "meta": {"model": "..."}}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from vlmfast.errors import DataError

IDS = ("id", "question_id", "image_id")  # ours; VQA's, LLaVA's and POPE's; COCO's
ANSWERS = ("prediction", "answer", "caption", "text")  # ours, VQA's and POPE's, COCO's, LLaVA's
TRUTHS = ("reference", "answers", "label", "caption", "answer")  # ours, VQA's, POPE's, COCO's, one answer a question
GROUPS = ("group", "answer_type")  # ours, VQA's
SLACK = 1e-3  # how far from 1 the sum of rounded probabilities may be
NAMED = 3  # ids in an error


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model said of one item, and what would have been right."""

    id: str
    prediction: str
    task: str = ""
    input: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None  # of the prediction: its probability, where it is to be calibrated
    probs: Mapping[str, float] | None = None  # candidate -> probability; they sum to 1
    references: tuple[str, ...] = ()  # every right answer, or one for each annotator
    group: str | None = None  # question family, POPE's strategy, ...
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def confidence(self) -> float | None:
        """The score, or else the probability that `probs` gives the prediction."""
        if self.score is not None:
            return self.score
        return None if self.probs is None else self.probs.get(self.prediction)


@dataclass(frozen=True)
class Truth:
    """What is right for one item."""

    references: tuple[str, ...]
    group: str | None = None


@dataclass(frozen=True)
class GroupMeans:
    """Means of a score in each group."""

    mean: dict[str, float]
    count: dict[str, int]
    micro: float  # over items
    macro: float  # over groups
    worst: str  # the group with the lowest mean


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file.

    The file holds one JSON object a line, or one list of them. Beside our own form it may have that of COCO's captions
    ({"image_id", "caption"}), VQA's results ({"question_id", "answer"}), LLaVA's answers ({"question_id", "text"}) or
    POPE's ({"question", "answer"}, which are counted from 1). Ids that are whole numbers become text.

    Args:
        path: the file.
    Raises:
        DataError: the file is empty, or a line is no such object, or has the id of an earlier one; its number is named.
    """
    found: dict[str, Prediction] = {}
    for place, row in _rows(path):
        pope = "question" in row and "answer" in row and not any(key in row for key in IDS)
        id = str(len(found) + 1) if pope else _id(place, row)
        if id in found:
            raise DataError(f"{place}: a second prediction for id {id!r}")
        found[id] = Prediction(
            id=id,
            prediction=_text(place, row, ANSWERS),
            task=_optional(place, row, "task", str) or "",
            input=_optional(place, row, "input", dict) or {key: row[key] for key in ("question",) if pope},
            score=_score(place, row.get("score")),
            probs=_probs(place, row.get("probs")),
            references=_references(place, row["reference"]) if row.get("reference") is not None else (),
            group=_optional(place, row, "group", str),
            meta=_optional(place, row, "meta", dict) or {},
        )
    if not found:
        raise DataError(f"{path}: has no predictions")
    return list(found.values())


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Nothing; the file holds the predictions, one a line, and at no moment only a part of them.

    Args:
        path: the file, which need not exist, nor its folder.
        predictions: may be made while they are written.
    Raises:
        DataError: two have one id.
    """
    partial, seen = path.with_name(f".{path.name}.{os.getpid()}.partial"), set()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as file:
            for each in predictions:
                if each.id in seen:
                    raise DataError(f"{path}: a second prediction for id {each.id!r}")
                seen.add(each.id)
                file.write(prediction_line(each))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_references(path: Path) -> dict[str, Truth]:
    """id -> what is right for it.

    The file may be one of ours, of which "id", "reference" and "group" are read; COCO's captions or VQA's annotations
    as they are published ({"annotations": [...]}; VQA's answer types become the groups); POPE's questions
    ({"question_id", "label"}, one object a line); or a list of {"question_id", "answer"}.

    Args:
        path: the file.
    Raises:
        DataError: the file is empty, or a line is no such object, or an id has several that are not COCO's captions.
    """
    found: dict[str, Truth] = {}
    for place, row in _rows(path):
        caption = _is_caption(row)
        id = _id(place, row)
        key = "caption" if caption else next((key for key in TRUTHS if row.get(key) is not None), None)
        if key is None:
            raise DataError(f"{place}: has none of {', '.join(TRUTHS)}")
        references = _references(place, row[key])
        if id in found and not caption:
            raise DataError(f"{place}: a second reference for id {id!r}")
        group = next((str(row[key]) for key in GROUPS if row.get(key) is not None), None)
        found[id] = Truth((found[id].references if id in found else ()) + references, group)
    if not found:
        raise DataError(f"{path}: has no references")
    return found


def with_references(
    predictions: Sequence[Prediction], truths: Mapping[str, Truth] | None = None, *, allow_missing: bool = False
) -> list[Prediction]:
    """The predictions that can be scored, each with its references.

    Args:
        predictions: what the model said.
        truths: what is right; it replaces references that predictions bring. None: each has its own.
        allow_missing: leave out ids that have a prediction or a reference but not both, instead of refusing.
    Raises:
        DataError: ids are missing on one side and allow_missing is False; their number and the first are named. Or no
            prediction has a reference.
    """
    if truths is None:
        whole = [each for each in predictions if each.references]
        unpredicted: list[str] = []
    else:
        whole = [
            replace(each, references=truths[each.id].references, group=truths[each.id].group or each.group)
            for each in predictions
            if each.id in truths
        ]
        unpredicted = sorted(truths.keys() - {each.id for each in predictions})
    if not whole:
        raise DataError(
            f"none of {len(predictions)} predictions has a reference; name a file that has theirs: --references"
        )
    known = {each.id for each in whole}
    unreferenced = [each.id for each in predictions if each.id not in known]
    for ids, lack in ((unpredicted, "references have no prediction"), (unreferenced, "predictions have no reference")):
        if ids and not allow_missing:
            first = ", ".join(map(repr, ids[:NAMED])) + (", ..." if len(ids) > NAMED else "")
            raise DataError(f"{len(ids)} {lack}: {first}; to leave them out: --allow-missing")
    return whole


def group_means(scores: Sequence[float], groups: Sequence[str | None]) -> GroupMeans:
    """The mean score of each group, of all items (micro) and of all groups (macro), and the worst group.

    Args:
        scores: of N items.
        groups: theirs; None is the group "".
    Raises:
        DataError: there are no items, or the two are not as many.
    """
    if not len(scores) or len(scores) != len(groups):
        raise DataError(f"group_means: needs the group of each score; got {len(scores)} and {len(groups)}")
    members: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        members.setdefault(group or "", []).append(float(score))
    mean = {group: math.fsum(each) / len(each) for group, each in sorted(members.items())}
    return GroupMeans(
        mean=mean,
        count={group: len(members[group]) for group in mean},
        micro=math.fsum(map(float, scores)) / len(scores),
        macro=math.fsum(mean.values()) / len(mean),
        worst=min(mean, key=lambda group: mean[group]),
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of a file of objects, one a line or in a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from None
    try:
        whole = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        if text.lstrip()[:1] == "[":
            raise DataError(f"{path}: {error}") from None
        yield from _lines(path, text)
        return
    if isinstance(whole, dict) and "annotations" not in whole:
        yield f"{path}:1", whole
        return
    rows = whole["annotations"] if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold objects, one a line or in a list; got {text[:40]!r}")
    for number, row in enumerate(rows, 1):
        place = f"{path}: object {number}"
        yield place, _object(place, row)


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                row = json.loads(line, parse_constant=_no_number)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
            yield place, _object(place, row)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: must be an object; got {str(row)[:40]!r}")
    return row


def _id(place: str, row: Mapping[str, Any]) -> str:
    keys = ("image_id",) if _is_caption(row) else IDS  # a caption's own "id" is another
    id = next((row[key] for key in keys if key in row), None)
    if isinstance(id, bool) or not isinstance(id, int | str):
        raise DataError(f"{place}: needs an id ({', '.join(IDS)}), text or a whole number; got {id!r}")
    return str(id)


def _is_caption(row: Mapping[str, Any]) -> bool:
    """Whether it is COCO's, as a reference or as a result."""
    return "image_id" in row and "caption" in row and "prediction" not in row


def _text(place: str, row: Mapping[str, Any], keys: Sequence[str]) -> str:
    text = next((row[key] for key in keys if key in row), None)
    if not isinstance(text, str):
        raise DataError(f"{place}: needs text as {' or '.join(keys)}; got {text!r}")
    return text


def _optional(place: str, row: Mapping[str, Any], key: str, kind: type) -> Any:
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{place}: {key} must be {kind.__name__}; got {value!r}")
    return value


def _score(place: str, score: Any) -> float | None:
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"{place}: score must be a finite number; got {score!r}")
    return float(score)


def _probs(place: str, probs: Any) -> dict[str, float] | None:
    if probs is None:
        return None
    if not isinstance(probs, dict) or not all(_is_probability(p) for p in probs.values()):
        raise DataError(f"{place}: probs must give each candidate a number from 0 to 1; got {str(probs)[:80]}")
    if abs(math.fsum(probs.values()) - 1) > SLACK:
        raise DataError(f"{place}: probs must sum to 1; they sum to {math.fsum(probs.values()):.4f}")
    return {candidate: float(p) for candidate, p in probs.items()}


def _is_probability(p: Any) -> bool:
    return isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1


def _references(place: str, value: Any) -> tuple[str, ...]:
    """One text, several, or VQA's objects with an "answer"."""
    several = value if isinstance(value, list) else [value]
    texts = [each.get("answer") if isinstance(each, dict) else each for each in several]
    words = tuple(text for text in texts if isinstance(text, str))
    if not words or len(words) < len(texts):
        raise DataError(f"{place}: references must be one text or a list of them; got {str(value)[:80]}")
    return words


def prediction_line(prediction: Prediction) -> str:
    """The prediction's line in a file, its end included; what is not known is left out.

    Args:
        prediction: what `read_predictions` is to give again.
    """
    row = {
        "id": prediction.id,
        "task": prediction.task,
        "input": dict(prediction.input),
        "prediction": prediction.prediction,
        "score": prediction.score,
        "probs": None if prediction.probs is None else dict(prediction.probs),
        "reference": list(prediction.references),
        "group": prediction.group,
        "meta": dict(prediction.meta),
    }
    known = {key: value for key, value in row.items() if value not in (None, "", {}, []) or key in ("id", "prediction")}
    return json.dumps(known, ensure_ascii=False) + "\n"
