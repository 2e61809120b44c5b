"""POPE on scenes: is there such a shape? Half of the shapes asked about are absent, and ever more tempting.

The sets are made as Li et al. 2023 make them of annotated photographs: of an image with three kinds of objects or more
the first three are asked about, and with each a shape that is absent: a random one, the most frequent one, or the one
that most often comes with the one asked about before. No shape is asked about twice for an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from vlmfast.data.scenes.latents import Field, attributes
from vlmfast.data.scenes.questions import YES_NO, Draw, Question, article, key
from vlmfast.data.scenes.shapes import SHAPES

STRATEGIES = ("random", "popular", "adversarial")
POSITIVES = 3
PER_IMAGE = 2 * POSITIVES
COUNTED = 5000  # training scenes in which shapes, and pairs of shapes, are counted
BLOCK = 512  # scenes looked at in one go


def pope(level: str, split: str, strategy: str, seed: int = 0) -> Iterator[tuple[int, list[Question]]]:
    """Scene after scene with three shapes or more, and the six questions about it: yes, no, yes, no, yes, no.

    Args:
        level: "L2" or a higher one; "L3-cooc" has shapes that come together.
        split: as `scenes.dataset`.
        strategy: one of STRATEGIES, by which absent shapes are chosen.
        seed: which world.

    Yields:
        Index of the scene, questions.

    Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models". Frequencies are those of
        the training split, not of the images asked about, so that a set does not depend on its size.
    """
    counts = together(presence(attributes(level, "train", np.arange(COUNTED), seed)))
    for start in range(0, 2**31, BLOCK):
        things = attributes(level, split, np.arange(start, start + BLOCK), seed)
        for row in np.flatnonzero(presence(things).sum(1) >= POSITIVES).tolist():
            present = list(dict.fromkeys(things["shape"][row, : things["count"][row]].tolist()))
            draw = Draw(*key(seed, level, split)[:3], Field.POPE, start + row)
            yield start + row, _six(present, strategy, counts, draw)


def _six(present: list[int], strategy: str, counts: np.ndarray, draw: Draw) -> list[Question]:
    """The questions about a scene with these shapes."""
    absent = list(draw.shuffled(k for k in range(len(SHAPES)) if k not in present))
    questions = []
    for shape in present[:POSITIVES]:
        if strategy != "random":  # ties go by lot
            absent.sort(key=lambda k: counts[k, k] if strategy == "popular" else counts[k, shape])
        questions += [_question(shape, "yes"), _question(absent.pop(), "no")]
    return questions


def _question(shape: int, answer: str) -> Question:
    name = SHAPES[shape]
    text = f"Is there {article(name)} {name} in the image?"
    return Question("pope", "exist", text, answer, YES_NO, ("exist", ("filter", "shape", name, ("all",))))


def presence(things: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n, 12] int64: 1 where a scene has the shape.

    Args:
        things: of n scenes, as `attributes` gives them.
    """
    live = np.arange(things["shape"].shape[1]) < things["count"][:, None]
    return (live[..., None] & (things["shape"][..., None] == np.arange(len(SHAPES)))).any(1).astype(np.int64)


def together(present: np.ndarray) -> np.ndarray:
    """[12, 12]: in how many scenes two shapes both are; on the diagonal, in how many one is.

    Args:
        present: [n, 12] as `presence` gives it.
    """
    return present.T @ present


def prior_answers(asked: Sequence[Sequence[str]], captions: Iterable[str]) -> list[list[str]]:
    """The answers of one who has read captions and sees, of each image, what is asked about it, but not the image.

    Of the shapes asked about one image the half is "yes" that best goes with the others: the mean over the others of
    how often, where those are, it is too. A model whose answers are as good needs no eyes.

    Args:
        asked: for each image the names of the shapes asked about, an even number.
        captions: of the training split, such as `caption(scene, "paragraph", 0)` gives them.
    """
    words = (text.lower().replace(".", "").split() for text in captions)
    counts = together(np.array([[int(name in each) for name in SHAPES] for each in words]))
    given = counts / np.maximum(np.diag(counts), 1)  # [b, a]: how often b is where a is
    answers = []
    for names in asked:
        places = [SHAPES.index(name) for name in names]
        among = given[np.ix_(places, places)]
        score = among.sum(1) - among.diagonal()
        likely = set(np.argsort(-score, kind="stable")[: len(names) // 2].tolist())
        answers.append(["yes" if k in likely else "no" for k in range(len(names))])
    return answers
