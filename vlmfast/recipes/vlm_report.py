"""What `vlmfast demo-vlm` leaves: a summary for programs, and a page of pictures, questions and answers for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from vlmfast.eval.calibration import expected_calibration_error
from vlmfast.eval.predictions import Prediction
from vlmfast.recipes.page import OURS, REFERENCE, RIVAL, figure, page, picture, svg, table
from vlmfast.recipes.train_vlm import accuracies, is_right
from vlmfast.recipes.vlm_data import Control

CAPTION_GOAL, ANSWER_GOAL = 0.95, 0.85
CONTROL_GOAL = 0.03  # that a model which sees nothing, or another image, may have above the prior
CONTROLS: dict[Control, str] = {"none": "the image", "blank": "gray", "shuffled": "another image"}
SHOWN = 15  # pictures of each task


@dataclass(frozen=True)
class Asked:
    """The answers of one task: with the images, and with each control instead."""

    predictions: Mapping[Control, Sequence[Prediction]]  # control -> of the same questions in the same order
    images: Sequence[Tensor]  # [3, H, W] uint8, of the first questions

    def accuracy(self, control: Control = "none") -> float:
        """The share of right answers.

        Args:
            control: what was shown.
        """
        return accuracies(self.predictions[control])["accuracy"]

    @property
    def priors(self) -> dict[str, float]:
        """Of each family, and of all questions, what always saying the family's most frequent answer gets right.

        The answers are counted among those that are scored, so this is the most that any constant answer can reach.
        """
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for each in self.predictions["none"]:
            answers[each.group or ""][each.references[0].lower()] += 1
        best = {group: count.most_common(1)[0][1] for group, count in answers.items()}
        totals = {group: count.total() for group, count in answers.items()}
        return {"accuracy": sum(best.values()) / sum(totals.values())} | {
            group: best[group] / totals[group] for group in best if group
        }


@dataclass(frozen=True)
class Results:
    """All that the demo measured."""

    metrics: Sequence[Mapping[str, float]]  # the lines of metrics.jsonl
    captions: Asked
    answers: Asked
    parameters: int
    training_s: float
    seconds: float
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    date: str


def goals(results: Results) -> list[tuple[str, str, bool]]:
    """What the demo is after: (what, what was measured, whether it is reached).

    Args:
        results: what was measured.
    """
    captions, answers = results.captions.accuracy(), results.answers.accuracy()
    prior = results.answers.priors["accuracy"]
    shuffled = results.answers.accuracy("shuffled")
    lucky = results.captions.accuracy("shuffled")
    return [
        (
            f"captions of held-out scenes right, at least {CAPTION_GOAL:.0%}",
            f"{captions:.1%}",
            captions >= CAPTION_GOAL,
        ),
        (f"questions answered right, at least {ANSWER_GOAL:.0%}", f"{answers:.1%}", answers >= ANSWER_GOAL),
        (
            f"with another image, at most {CONTROL_GOAL:.0%} above the prior of {prior:.1%}",
            f"{shuffled:.1%}",
            shuffled <= prior + CONTROL_GOAL,
        ),
        (f"captions right with another image, at most {CONTROL_GOAL:.0%}", f"{lucky:.1%}", lucky <= CONTROL_GOAL),
    ]


def calibration_error(answers: Asked) -> float:
    """How far the answers' confidences are from how often they are right, in 15 bins.

    Args:
        answers: with confidences.
    """
    found = answers.predictions["none"]
    confidence = torch.tensor([each.confidence for each in found], dtype=torch.float64)
    return expected_calibration_error(confidence, torch.tensor([is_right(each) for each in found]))


def summary(results: Results) -> dict[str, Any]:
    """The numbers, ready for JSON.

    Args:
        results: what was measured.
    """
    asked = {"captions": results.captions, "answers": results.answers}
    return {
        "schema": "vlmfast-demo-vlm-1",
        "goals": [{"goal": goal, "measured": value, "reached": reached} for goal, value, reached in goals(results)],
        "parameters": results.parameters,
        "training_s": results.training_s,
        "total_s": results.seconds,
        "calibration_error": calibration_error(results.answers),
        "accuracy": {
            name: {control: accuracies(found) for control, found in each.predictions.items()}
            for name, each in asked.items()
        },
        "prior": results.answers.priors,
        "machine": dict(results.machine),
        "versions": dict(results.versions),
    }


def html(results: Results) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        results: what was measured.
    Raises:
        MissingExtraError: matplotlib or Pillow is missing.
    """
    sections = [
        ("Pictures in words", CAPTION_TEXT, _shots(results.captions)),
        ("Questions and answers", ANSWER_TEXT, _shots(results.answers)),
        ("With other images, or none", CONTROL_TEXT, _control_table(results)),
        ("How it was learnt", CURVE_TEXT, _curve(results.metrics)),
    ]
    cards = [(value, goal, reached) for goal, value, reached in goals(results)]
    cards.append((f"{results.training_s / 60:.1f} min", f"to train {results.parameters / 1e6:.2f} M parameters", True))
    cards.append((f"{calibration_error(results.answers):.3f}", "calibration error of the answers' confidence", True))
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items() if version)
    facts = results.machine
    footer = f"{facts['cpu']}, {facts['cores']} cores · {versions} · {results.date} · {results.seconds:.0f} s in all"
    return page("A small model learns to say what it sees", INTRODUCTION, cards, sections, footer)


def show(results: Results) -> str:
    """The goals as lines of text.

    Args:
        results: what was measured.
    """
    lines = [f"{value:>8}  {goal}{'' if reached else '  MISSED'}" for goal, value, reached in goals(results)]
    return "\n".join(lines)


def _shots(asked: Asked) -> str:
    """The first pictures, each with what was asked, said and true."""
    cells = []
    for each, image in zip(asked.predictions["none"], asked.images, strict=False):
        right = is_right(each)
        question = each.input["question"]
        told = "" if each.task == "caption" else f"<q>{escape(question)}</q>"
        truth = "" if right else f"<br><i>it is: {escape(each.references[0])}</i>"
        sure = "" if each.confidence is None else f" <i>{each.confidence:.0%}</i>"
        caption = f"{told}<b>{escape(each.prediction)}</b>{sure}{truth}{_bars(each.probs)}"
        kind = "hit" if right else "miss"
        cells.append(
            f"<figure class={kind}>{picture(image, each.references[0])}<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="shots">{"".join(cells)}</div>'


def _bars(probs: Mapping[str, float] | None) -> str:
    """The likeliest candidates."""
    best = sorted((probs or {}).items(), key=lambda pair: -pair[1])[:4]
    return "".join(
        f'<div class="bar"><span>{escape(candidate)}</span><u style="width:{100 * chance:.0f}px"></u>{chance:.0%}</div>'
        for candidate, chance in best
    )


def _control_table(results: Results) -> str:
    """A row for captions, one for all questions, and one for each family of them."""
    answers, priors = results.answers, results.answers.priors
    scores = {control: accuracies(found) for control, found in answers.predictions.items()}
    counts = Counter(each.group for each in answers.predictions["none"])
    header = ["", "n", "best constant answer", *CONTROLS.values()]
    captions = [f"{results.captions.accuracy(control):.1%}" for control in CONTROLS]
    n = len(results.captions.predictions["none"])
    rows = [["captions", str(n), "-", *captions]]
    for name in ("accuracy", *sorted(group for group in priors if group != "accuracy")):
        cells = [f"{scores[control][name]:.1%}" for control in CONTROLS]
        total = counts.total() if name == "accuracy" else counts[name]
        rows.append(["all questions" if name == "accuracy" else name, str(total), f"{priors[name]:.1%}", *cells])
    return table("", header, rows)


def _curve(metrics: Sequence[Mapping[str, float]]) -> str:
    """The loss of every logged step, and accuracy on held-out scenes."""
    drawing = figure(figsize=(9.6, 4.4), layout="constrained")
    left = drawing.subplots()
    steps = [line["step"] for line in metrics if "train/text_loss" in line]
    losses = [line["train/text_loss"] for line in metrics if "train/text_loss" in line]
    left.semilogy(steps, losses, color=RIVAL, linewidth=1, label="training loss, nats a token")
    left.set(xlabel="step", ylabel="loss, nats a token")
    right = left.twinx()
    for name, colour in (("caption", OURS), ("vqa", REFERENCE)):
        points = [(line["step"], line[f"val/{name}/accuracy"]) for line in metrics if f"val/{name}/accuracy" in line]
        if points:
            right.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=name)
    right.set(ylim=(0, 1.02), ylabel="right on held-out scenes")
    right.spines["right"].set_visible(True)
    right.legend(frameon=False, loc="center right")
    return svg(drawing, "Training loss, and accuracy of captions and answers on held-out scenes, by step")


INTRODUCTION = """A language model of a few layers reads patches of pixels as if they were words, and learns from
pictures with captions and questions; the words that it has to say itself are all that is supervised. Nothing in it was
trained before."""
CAPTION_TEXT = """Scenes that training never saw. Under each what the model says, and the probability that it gives
these very words. Red: it is wrong, and what is there."""
ANSWER_TEXT = """Questions about scenes that training never saw; they ask for a colour, a size or a shape. The bars: how
likely the model finds each possible answer, in shares."""
CONTROL_TEXT = """The same questions with a gray image, or with another question's image. What is answered right then is
answered without looking. The families of questions are balanced: no constant answer is right much oftener than any."""
CURVE_TEXT = """Every logged step's loss, and how many captions and answers were right on held-out scenes. It is far
from its end: docs/vlm.md has longer runs."""
