"""Scenes as tasks for a vision-language model: conversations about images whose right answers are known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from vlmfast.data.conversation import IMAGE_MARK, Conversation, Turn, VlmSample
from vlmfast.data.scenes.captions import GRANULARITIES, caption, references
from vlmfast.data.scenes.instruct import Instruction, instruct
from vlmfast.data.scenes.latents import LEVELS, MAX_INDEX, SPLIT_SIZES, Latents, Scene, attributes, check, sample
from vlmfast.data.scenes.pope import PER_IMAGE, POSITIVES, STRATEGIES, pope
from vlmfast.data.scenes.questions import SCARCE, Draw, Question, ask, key, predicates, promising
from vlmfast.data.scenes.render import render
from vlmfast.data.scenes.samples import MIXED
from vlmfast.errors import DataError

TASKS = ("caption", "vqa", "instruct", *(f"pope-{strategy}" for strategy in STRATEGIES))
INSTRUCTIONS = {
    "word": "Describe the image in one word.",
    "phrase": "Describe the image in a phrase.",
    "sentence": "Describe the image in one sentence.",
    "multi-sentence": "Describe the image in a few sentences.",
    "paragraph": "Describe the image in detail.",
}
CHUNK = 256  # items whose texts are made at a time
POPE_SIZE = 3000  # items by default: 500 images, as published
STRIDE = 2**20  # item i of "vqa" looks for its scene at i, i + STRIDE, i + 2 · STRIDE, ...
FIRST_BLOCK, BLOCK = 8, 128  # scenes that are looked at in one go for an item: at first, and at most


@dataclass(frozen=True)
class Exchange:
    """A question about an image, its answer, and what a scorer wants to know."""

    question: str
    answer: str
    truth: Callable[[], dict[str, Any]] = field(default=dict, repr=False)


# Of the items at some places: the scenes, a row an item, and the exchanges about each.
Read = Callable[[Sequence[int]], tuple[Latents, list[list[Exchange]]]]


class SceneTask:
    """Conversations about scenes, each made when it is asked for. `dataset` makes one.

    `read(places)` gives their scenes, as Latents, and the exchanges about each.
    """

    def __init__(self, name: str, size: int, image_size: int, read: Read) -> None:
        self.name, self.size, self.image_size, self.read = name, size, image_size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> VlmSample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[VlmSample]:
        """The items at many places, several times faster than one by one."""
        places = [range(self.size)[index] for index in indices]
        latents, items = self.read(places)
        images = torch.from_numpy(render(latents, self.image_size))
        rows = zip(places, items, latents.index.tolist(), images, strict=True)
        return [
            VlmSample(self.conversation(place, exchanges, scene), image[None])
            for place, exchanges, scene, image in rows
        ]

    def truth(self, index: int, turn: int = 0) -> dict[str, Any]:
        """What scorers want to know of item `index`: the right answers, and what kind of question it is.

        Args:
            index: the item.
            turn: which of its questions.
        """
        latents, items = self.read([range(self.size)[index]])
        exchange = items[0][turn]
        about = {"task": self.name, "scene": int(latents.index[0]), "question": exchange.question}
        return about | {"answer": exchange.answer} | exchange.truth()

    def texts(self) -> Iterator[str]:
        """What is said in each item, without drawing it: what a tokenizer trains on."""
        for first in range(0, self.size, CHUNK):
            for exchanges in self.read(range(first, min(first + CHUNK, self.size)))[1]:
                yield "\n".join(text for each in exchanges for text in (each.question, each.answer))

    def conversation(self, place: int, exchanges: list[Exchange], scene: int) -> Conversation:
        """The exchanges of item `place` as turns; its image is named after the scene's number."""
        turns = [turn for each in exchanges for turn in (Turn("user", each.question), Turn("assistant", each.answer))]
        turns[0] = Turn("user", f"{IMAGE_MARK}\n{turns[0].text}")
        return Conversation(f"{self.name}-{place}", (f"{scene}.png",), tuple(turns))


def dataset(
    level: str = "L1",
    split: str = "train",
    task: str = "caption",
    size: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    *,
    granularity: str = "sentence",
    families: Sequence[str] | None = None,
    questions_per_image: int = 1,
    cooc: bool = False,
) -> SceneTask:
    """A map-style data set of conversations about scenes.

    "caption": an instruction that names the granularity, and the canonical caption (paraphrase 0 in reading order), so
    that an image has one right answer. Item i shows scene i. The truth has "references", every right caption.

    Args:
        level: as `scenes.dataset`.
        split: as `scenes.dataset`.
        task: one of TASKS.
        size: how many items; default: as `scenes.dataset`. The first items of a larger data set are those of a smaller.
        image_size: side in pixels; default: the level's.
        seed: which world.
        granularity: of captions: one of GRANULARITIES, or "mixed" for each scene its own.
        families: of "vqa": some of `questions.predicates(level)`, as "exist", or as "exist:shape" one predicate of it
            alone; default: all.
        questions_per_image: of "vqa": how many questions, at least 1; of an image that has not so many, fewer.
        cooc: of L3: the world in which six pairs of shapes come together four times as often as by chance, or more.

    Returns:
        SceneTask: len(), [i] -> VlmSample(conversation, image uint8 [1, 3, S, S]), truth(i), texts().

    Raises:
        DataError: there is no such level, split, task, granularity, family or predicate, a size is out of range, or the
            level has too few objects for the task.
    """
    if cooc and level != "L3":
        raise DataError(f"scenes: cooc=True is a variant of level L3; got level {level!r}")
    level = "L3-cooc" if cooc else level
    facts = check(level, split)
    size = (POPE_SIZE if task.startswith("pope") else SPLIT_SIZES[split]) if size is None else size
    side = facts.image_size if image_size is None else image_size
    if task not in TASKS:
        raise DataError(f"scenes: task must be one of {', '.join(TASKS)}; got {task!r}")
    if granularity not in (*GRANULARITIES, MIXED):
        raise DataError(f"scenes: granularity must be one of {', '.join((*GRANULARITIES, MIXED))}; got {granularity!r}")
    if task.startswith("pope") and facts.objects[1] < POSITIVES:
        some = ", ".join(name for name, other in LEVELS.items() if other.objects[1] >= POSITIVES)
        raise DataError(f"scenes: {task} asks about {POSITIVES} shapes; levels with so many are {some}; got {level!r}")
    if not 1 <= size <= STRIDE:
        raise DataError(f"scenes: a task has 1 .. 2**20 items; got size {size}")
    if not 16 <= side <= 2048:
        raise DataError(f"scenes: image_size must be 16 .. 2048 pixels; got {side}")
    if task == "caption":
        read = _captions(level, split, seed, granularity)
    elif task == "vqa":
        read = _questions(level, split, seed, families, questions_per_image)
    elif task == "instruct":
        read = _instructions(level, split, seed)
    else:
        read = _pope(level, split, seed, task.removeprefix("pope-"))
    return SceneTask(task, size, side, read)


def _captions(level: str, split: str, seed: int, granularity: str) -> Read:
    def read(places: Sequence[int]) -> tuple[Latents, list[list[Exchange]]]:
        latents = sample(level, split, places, seed)
        items = []
        for scene in latents.scenes():
            told = GRANULARITIES[scene.wording[1]] if granularity == MIXED else granularity

            def truth(scene: Any = scene, told: str = told) -> dict[str, Any]:
                return {"granularity": told, "references": references(scene, told)}

            items.append([Exchange(INSTRUCTIONS[told], caption(scene, told, 0, "reading"), truth)])
        return latents, items

    return read


def _questions(level: str, split: str, seed: int, families: Sequence[str] | None, count: int) -> Read:
    known = predicates(level)
    asked: dict[str, tuple[str, ...]] = {}  # family -> its predicates that are asked
    for name in known if families is None else families:
        family, _, predicate = name.partition(":")
        if predicate not in ("", *known.get(family, ())) or family not in known:
            some = ", ".join(f"{family} ({', '.join(each)})" for family, each in known.items())
            raise DataError(
                f"scenes: families at {level}, and their predicates, are {some}; such as 'exist', or 'exist:shape' for "
                f"one predicate alone; got {name!r}"
            )
        asked[family] = tuple(dict.fromkeys((*asked.get(family, ()), *([predicate] if predicate else known[family]))))
    if not asked or count < 1:
        raise DataError(f"scenes: vqa takes a family and a question an image at least; got {families} and {count}")
    families = tuple(asked)
    scarce = [family for family in families if family in SCARCE]
    free = [family for family in families if family not in SCARCE]
    keys = key(seed, level, split)

    def first(place: int) -> tuple[str, str, str]:
        """Family, predicate and wanted answer of an item's first question."""
        draw = Draw(*keys, place)
        # A scarce family can only come first: as often as makes it as frequent as the others.
        some = scarce if draw.below(len(families)) < count * len(scarce) else free
        return _wanted(draw.one(some or scarce or free), draw)

    def _wanted(family: str, draw: Draw) -> tuple[str, str, str]:
        predicate = draw.one(asked[family])
        return family, predicate, draw.one(known[family][predicate])

    def more(scene: Scene, question: Question, place: int) -> list[Question]:
        """`count` questions about the scene, in any order; fewer where it has not so many, or some would come twice."""
        draw = Draw(*keys, place, 1)
        found = {question.text: question}
        order = draw.shuffled(family for family in free if family != question.family)
        rounds = max(2, -(-count // max(len(free), 1)))
        for family in [*order, *(family for _ in range(rounds) for family in draw.shuffled(free))]:
            if len(found) < count and (other := ask(scene, *_wanted(family, draw), draw)):
                found.setdefault(other.text, other)
        return list(draw.shuffled(found.values()))

    def read(places: Sequence[int]) -> tuple[Latents, list[list[Exchange]]]:
        items: dict[int, list[Exchange]] = {}  # by place, in the order of `found`
        found: list[Latents] = []
        pending, start, block = list(dict.fromkeys(places)), 0, FIRST_BLOCK
        while pending:
            if start + block > MAX_INDEX // STRIDE:
                raise DataError(f"scenes: {level}/{split} has too few scenes to ask {first(pending[0])} about")
            tries = np.array(pending)[:, None] + STRIDE * np.arange(start, start + block)  # [pending, block] scenes
            things = attributes(level, split, tries, seed)
            wanted = {place: first(place) for place in pending}
            left = {}
            for row, place in enumerate(pending):
                own = {name: array[row * block : (row + 1) * block] for name, array in things.items()}
                left[place] = tries[row][promising(own, *wanted[place])].tolist()
            while left := {place: scenes for place, scenes in left.items() if scenes}:
                latents = sample(level, split, [scenes.pop(0) for scenes in left.values()], seed)
                good = []
                for row, (place, scene) in enumerate(zip(list(left), latents.scenes(), strict=True)):
                    if question := ask(scene, *wanted[place], Draw(*keys, place, 0, scene.index)):
                        every = more(scene, question, place) if count > 1 else [question]
                        items[place] = [_exchange(each) for each in every]
                        good.append(row)
                        del left[place]
                found.append(latents.take(np.array(good, np.int64)))
            pending = [place for place in pending if place not in items]
            start, block = start + block, min(4 * block, BLOCK)
        rows = {place: row for row, place in enumerate(items)}
        order = np.array([rows[place] for place in places])
        return found[0].join(*found[1:]).take(order), [items[place] for place in places]

    return read


def _instructions(level: str, split: str, seed: int) -> Read:
    predicates(level)  # refuses a level without questions at once

    def read(places: Sequence[int]) -> tuple[Latents, list[list[Exchange]]]:
        latents = sample(level, split, places, seed)
        items = []
        for scene in latents.scenes():
            turns = [Exchange(each.question, each.answer, partial(_instructed, each)) for each in instruct(scene)]
            items.append(turns)
        return latents, items

    return read


def _instructed(turn: Instruction) -> dict[str, Any]:
    return {"kind": turn.kind, "checks": turn.checks}


def _pope(level: str, split: str, seed: int, strategy: str) -> Read:
    coming = pope(level, split, strategy, seed)
    images: list[tuple[int, list[Question]]] = []  # as far as they were asked for
    lock = threading.Lock()  # `batches` reads from several threads

    def read(places: Sequence[int]) -> tuple[Latents, list[list[Exchange]]]:
        with lock:
            while len(images) <= max(places) // PER_IMAGE:
                images.append(next(coming))
        of = [images[place // PER_IMAGE] for place in places]
        items = [[_exchange(asked[place % PER_IMAGE])] for place, (_, asked) in zip(places, of, strict=True)]
        return sample(level, split, [index for index, _ in of], seed), items

    return read


def _exchange(question: Question) -> Exchange:
    facts = {name: getattr(question, name) for name in ("family", "predicate", "candidates", "program")}
    return Exchange(question.text, question.answer, lambda: facts)
