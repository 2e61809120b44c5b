"""What `vlmfast caption` and `vlmfast vqa` have in common: what is asked, with which control, and where answers go."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from vlmfast.data.templates import TEMPLATES
from vlmfast.errors import DataError
from vlmfast.eval.predictions import Prediction, prediction_line
from vlmfast.recipes.progress import counted
from vlmfast.recipes.sources import SceneSplit, tell_skipped
from vlmfast.recipes.train_vlm import accuracies
from vlmfast.recipes.vlm_data import Control, Items, Questions, VlmDataFlags, open_conversations
from vlmfast.recipes.vlm_predict import Talker, VlmFlags, answer, ask, open_talker, predict

SIZE = 500  # questions about scenes, where no number is given


@dataclass(kw_only=True)
class AskFlags(VlmFlags, VlmDataFlags):
    """What is asked of a model, and where its answers go."""

    images: tuple[Path, ...]
    """Image files, each asked about by itself."""
    level: str = ""
    """Ask about scenes of this level instead."""
    split: SceneSplit = "test"
    """Of scenes."""
    data: str = ""
    """Ask what a file of LLaVA's format asks instead; its answers are the references."""
    questions: Path | None = None
    """Ask a file of questions instead, as LLaVA's and POPE's are: lines with "image", "text" and "question_id"."""
    n: int | None = None
    """At most so many questions. Default: 500 of scenes, all of a file."""
    control: Control = "none"
    """blank: gray images; shuffled: another question's image. What is still answered right needs no image."""
    out: Path | None = None
    """Write the predictions here, one JSON object a line, for vlmfast eval. Until all are there they are in
    OUT.partial."""
    json: bool = False
    """Print one JSON object."""


def run_ask(config: AskFlags, task: str, question: str, candidates: Sequence[str] = (), rank: bool = False) -> None:
    """Asks, prints the answers or their accuracy, and writes the predictions.

    Args:
        config: the flags.
        task: of scenes.
        question: what is asked about image files.
        candidates: possible answers to it.
        rank: choose among a question's candidates instead of writing.
    Raises:
        DataError: nothing is asked, or more than one thing; candidates of scenes, which have their own; the model or
            the data cannot be read.
    """
    if config.batch_size < 1 or (config.n is not None and config.n < 1):
        raise DataError(f"--batch-size and --n must be at least 1; got {config.batch_size} and {config.n}")
    asked = [bool(config.images), bool(config.level), bool(config.data), config.questions is not None]
    if sum(asked) != 1:
        raise DataError("say what is asked about by one of: image files, --level, --data, --questions")
    if config.level and candidates:
        raise DataError("--candidates is not for --level: scenes have candidates of their own; choose by --rank")
    if rank and not config.level and not candidates:
        raise DataError("--rank chooses among --candidates, or among those that questions about a --level have")
    talker = open_talker(config)
    if config.images:
        batches = _of_files(config, talker, question, candidates)
    else:
        items = _items(config, talker, task, tuple(candidates))
        told = predict(talker, items, config, control=config.control, rank=rank or bool(candidates))
        batches = counted(told, "answers", len(items))
    if config.out is not None:
        batches = _kept(config.out, batches)
    _tell(config, [each for part in batches for each in part])


def _kept(out: Path, batches: Iterator[list[Prediction]]) -> Iterator[list[Prediction]]:
    """The batches as they come, each added at once to OUT.partial, which becomes OUT when all are there."""
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        names = (out.with_name(f"{partial.name}.{number}") for number in count(1))
        aside = partial.rename(next(name for name in names if not name.exists()))
        print(f"{aside}: the answers of a run that was stopped", file=sys.stderr)
    with partial.open("w", encoding="utf-8") as file:
        for batch in batches:
            file.writelines(map(prediction_line, batch))
            file.flush()
            yield batch
        os.fsync(file.fileno())
    os.replace(partial, out)


def _of_files(config: AskFlags, talker: Talker, question: str, candidates: Sequence[str]) -> Iterator[list[Prediction]]:
    """The answers to image files, a batch after the other."""
    if config.control != "none":
        raise DataError("--control is for questions with known answers: --level, --data or --questions")
    if not question and not TEMPLATES[talker.template].marks_only:
        raise DataError("image files need a --question")
    names = [path.stem for path in config.images]
    ids = names if len(set(names)) == len(names) else list(map(str, config.images))
    if len(set(ids)) < len(ids):
        raise DataError("an image file is named twice")
    for first in range(0, len(config.images), config.batch_size):
        rows = range(first, min(first + config.batch_size, len(ids)))
        items = [replace(ask([config.images[row]], talker, question, candidates), id=ids[row]) for row in rows]
        yield answer(talker, items, config, rank=bool(candidates))


def _items(config: AskFlags, talker: Talker, task: str, candidates: tuple[str, ...]) -> Items | Questions:
    if config.questions is not None:
        return Questions(config.questions, config.image_folder, talker.pixels, config.n, candidates)
    if config.data:
        config.dataset_type = "llava"
        found = open_conversations(config, config.data, task, config.split, None, talker.pixels)
        tell_skipped(found)
        return Items(found, config.n, candidates)
    size = config.n or SIZE
    return Items(open_conversations(config, config.level, task, config.split, size, talker.pixels), size)


def _tell(config: AskFlags, found: Sequence[Prediction]) -> None:
    """Prints the answers to image files, and the accuracy of the others."""
    scores = accuracies([each for each in found if each.references])
    if config.json:
        answers: list[dict[str, Any]] = [
            {
                "id": each.id,
                "images": each.input["images"],
                "prediction": each.prediction,
                "score": each.score,
                "probs": each.probs,
            }
            for each in found
        ]
        print(json.dumps({"predictions": answers, "scores": scores}))
    elif config.images:
        for each in found:
            print(f"{each.input['images'][0]}\t{each.prediction}\t{each.confidence:.3f}")
            for candidate, chance in sorted((each.probs or {}).items(), key=lambda pair: -pair[1]):
                print(f"\t{candidate}\t{chance:.3f}")
    else:
        for name, value in scores.items():
            print(f"{name:<30} {value:.4f}")
        print(f"{len(found)} answers" + (f": {config.out}" if config.out else ""))
