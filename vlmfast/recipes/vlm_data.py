"""The conversations that a vision-language model trains on and is asked about: scenes as tasks, or LLaVA's JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.conversation import (
    EARLY,
    IMAGE_MARK,
    Aspect,
    Conversation,
    LlavaJson,
    Turn,
    VlmSample,
    load_vlm_image,
)
from vlmfast.data.lm_tokenizer import LmTokenizer, train_lm_tokenizer
from vlmfast.data.order import random_bits
from vlmfast.data.scenes import tasks
from vlmfast.data.scenes.latents import SPLIT_SIZES
from vlmfast.data.skips import UnreadableError
from vlmfast.data.templates import TEMPLATES
from vlmfast.errors import DataError
from vlmfast.recipes.sources import SceneSplit

Control = Literal["none", "blank", "shuffled"]

GRAY = 128  # of every pixel of a blank image
CHUNK = 256  # samples read at a time
TEXTS = 20_000  # conversations that a tokenizer is trained on
LEVELS = ("L0", "L1", "L2", "L3")


@dataclass(kw_only=True)
class VlmDataFlags:
    """What the conversations are about."""

    dataset_type: Literal["scenes", "llava"] = "scenes"
    """scenes (made here, without end), or a file of LLaVA's format and a folder of images."""
    image_folder: Path = Path()
    """llava: where the names of images start."""
    image_aspect_ratio: Literal["pad", "square", "squash"] | None = None
    """llava: pad (a square of the mean colour around the image), square (its middle) or squash. Default: the model's
    own, else pad."""
    skip_bad: bool = False
    """llava: leave out records that cannot be used, and those whose images are missing, count them and tell it, instead
    of refusing the file."""
    questions_per_image: int = 1
    """scenes, vqa: so many questions about each image, in one conversation."""
    families: str = ""
    """scenes, vqa: these families of questions alone, joined by commas; exist:shape is one predicate of a family."""
    cooc: bool = False
    """scenes, L3: the world in which some shapes come together more often than by chance, as POPE's questions ask."""
    granularity: Literal["word", "phrase", "sentence", "multi-sentence", "paragraph", "mixed"] = "sentence"
    """scenes, caption: how much a caption tells."""
    world: int = 0
    """scenes: the seed of the world."""


@dataclass(frozen=True)
class Pixels:
    """How images are prepared for a model: what a data set must know of it."""

    image_hw: tuple[int, int]
    image_mean: tuple[float, ...]
    aspect: Aspect = "pad"


class TaskMix:
    """Scenes with a task each, drawn by weight: place i has one task for good.

    Args:
        sources: a data set of each task, all of one length.
        weights: how often each task comes, in proportion.
    Raises:
        DataError: their lengths differ.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]) -> None:
        if len({len(source) for source in sources}) > 1:
            raise DataError(f"TaskMix: sources must be of one length; got {[len(source) for source in sources]}")
        self.sources, self._edges = list(sources), np.cumsum(weights) / sum(weights)

    def __len__(self) -> int:
        return len(self.sources[0])

    def __getitem__(self, index: int) -> VlmSample:
        return self._of(index)[index]

    def __getitems__(self, indices: Sequence[int]) -> list[VlmSample]:
        """The items at many places, each task's in one call."""
        found: dict[int, VlmSample] = {}
        for source in self.sources:
            own = [index for index in indices if self._of(index) is source]
            if own:
                found.update(zip(own, source.__getitems__(own), strict=True))
        return [found[index] for index in indices]

    def truth(self, index: int, turn: int = 0) -> dict[str, Any]:
        """What scorers want to know of item `index`.

        Args:
            index: the item.
            turn: which of its questions.
        """
        return self._of(index).truth(index, turn)

    def texts(self) -> Iterator[str]:
        """What is said, the tasks taking turns."""
        for texts in zip(*(source.texts() for source in self.sources), strict=True):
            yield from texts

    def _of(self, index: int) -> Any:
        chance = float(random_bits(index) >> np.uint64(11)) * 2.0**-53
        return self.sources[int(np.searchsorted(self._edges, chance, side="right"))]


class Changed:
    """A data set whose samples pass through a function: what a model is shown instead of them.

    Args:
        dataset: of VlmSample.
        change: sample -> sample.
    """

    def __init__(self, dataset: Any, change: Any) -> None:
        self.dataset, self._change = dataset, change
        if hasattr(dataset, "skips"):
            self.skips = dataset.skips
            self.draw = self._draw

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> VlmSample:
        return self._change(self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[VlmSample]:
        return [self._change(sample) for sample in self.dataset.__getitems__(indices)]

    def _draw(self, index: int, seed: int, epoch: int) -> VlmSample | None:
        sample = self.dataset.draw(index, seed, epoch)
        return None if sample is None else self._change(sample)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


def blank(sample: VlmSample) -> VlmSample:
    """The sample with gray images: what can be answered without looking.

    Args:
        sample: stays as it is.
    """
    return replace(sample, image=torch.full_like(sample.image, GRAY))


def without_images(sample: VlmSample) -> VlmSample:
    """The sample as text alone.

    Args:
        sample: stays as it is.
    """
    conversation = sample.conversation
    turns = (replace(turn, text=turn.text.replace(IMAGE_MARK, "").strip()) for turn in conversation.turns)
    return VlmSample(replace(conversation, images=(), turns=tuple(turns)), sample.image[:0])


def open_conversations(
    flags: VlmDataFlags, where: str, task: str, split: SceneSplit, size: int | None, pixels: Pixels | None
) -> Any:
    """The data set that the flags name, of VlmSample; a file of LLaVA's format is refused if a record of it is wrong.

    With `skip_bad` such records are left out and counted in its `skips`.

    Args:
        flags: the kind of data.
        where: a level of scenes, or a file.
        task: scenes: tasks by name, "caption" or "caption=1,vqa=3" with weights; not looked at for a file.
        split: of scenes.
        size: how many scenes; None: 100 000 to train, else 5 000.
        pixels: how images are prepared; None: as the level makes them (for scenes only).
    Raises:
        DataError: no such level, task or file; a record that cannot be trained on, with its name and how many there
            are; an image that is missing.
    """
    if flags.dataset_type == "llava":
        if not where or pixels is None:
            raise DataError("--dataset-type llava needs a JSON file: --train-data, --val-data or --data")
        found = LlavaJson(where, flags.image_folder, pixels.image_hw, aspect=pixels.aspect, mean=pixels.image_mean)
        if set(found.skipped) - {EARLY} and not flags.skip_bad:
            wrong = found.describe_skipped().replace("skipped", "cannot use", 1)
            raise DataError(f"{where}: {wrong}. Mend or remove them, or give --skip-bad")
        _check_images(found, where, flags.skip_bad)
        return found
    if where and where not in LEVELS:
        raise DataError(f"scenes are of the levels {', '.join(LEVELS)}; got {where!r}. Files need --dataset-type llava")
    weights = task_weights(task)
    size = SPLIT_SIZES[split] if size is None else size  # of all tasks alike
    how: dict[str, Any] = {"size": size, "image_size": None if pixels is None else pixels.image_hw[0]}
    made = []
    for name in weights:
        options: dict[str, Any] = {"granularity": flags.granularity} if name == "caption" else {}
        if name == "vqa":
            families = [word.strip() for word in flags.families.split(",") if word.strip()]
            options = {"questions_per_image": flags.questions_per_image, "families": families or None}
        made.append(tasks.dataset(where or "L1", split, name, seed=flags.world, cooc=flags.cooc, **how, **options))
    return made[0] if len(made) == 1 else TaskMix(made, list(weights.values()))


def _check_images(found: LlavaJson, where: str, skip_bad: bool) -> None:
    """Raises at the first image that is missing; or leaves out the conversations about such images, and counts them."""
    whole = []
    for place, conversation in enumerate(found.conversations):
        paths = [found.image_folder / name for name in conversation.images]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing is None:
            whole.append(conversation)
            continue
        told = f"{where}: sample {conversation.id!r}"
        if not skip_bad:
            raise DataError(f"{told}: there is no image {missing}")
        found.skips.add(f"images of {place}", UnreadableError("missing image", told, str(missing)))
    if not whole:
        raise DataError(f"{where}: has no conversation whose images are there: {found.describe_skipped()}")
    found.conversations = whole


def task_weights(task: str) -> dict[str, float]:
    """Task -> weight, of words such as "caption,vqa" or "caption=1,vqa=3".

    Args:
        task: what --vlm-task says.
    Raises:
        DataError: a weight is no number > 0.
    """
    weights = {}
    for part in task.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            weights[name.strip()] = math.nan
        if not 0 < weights[name.strip()] < math.inf:
            raise DataError(
                f"--vlm-task {task!r}: the weight of {name!r} must be a number > 0, such as caption=1,vqa=3"
            )
    return weights


def train_vocabulary(dataset: Any, template: str, vocab_size: int) -> LmTokenizer:
    """A tokenizer of what is said in the data set, and of the words of the template around it.

    Args:
        dataset: what `open_conversations` returned.
        template: one of TEMPLATES.
        vocab_size: V at most.
    Raises:
        DataError: vocab_size is too small for the bytes.
    """
    frame = Conversation("", (), (Turn("user", "?"), Turn("assistant", "!")))
    around = TEMPLATES[template].render(frame, bos="", eos="").text
    marks = [TEMPLATES[template].end] if TEMPLATES[template].end.startswith("<|") else []
    special = [*marks, *(["<|im_start|>"] if marks else [])]

    def texts() -> Iterator[str]:
        for text in islice(dataset.texts(), TEXTS):
            yield text
            yield around

    try:
        return train_lm_tokenizer(texts(), vocab_size, special=special)
    except DataError:  # of the data
        raise
    except ValueError as error:
        raise DataError(f"--vocab-size {vocab_size}: {error}") from None


@dataclass(frozen=True)
class Item:
    """One question: what a model is shown, and what is known of the answer."""

    id: str
    conversation: Conversation  # ends with the question
    image: Tensor  # [n, 3, H, W] uint8
    task: str = ""
    references: tuple[str, ...] = ()  # every right answer; none if nobody knows
    candidates: tuple[str, ...] = ()  # what can be answered at all; none if that is open
    group: str | None = None

    @property
    def question(self) -> str:
        """The last question, without the marks of images."""
        return self.conversation.turns[-1].text.replace(IMAGE_MARK, "").strip()


@dataclass(frozen=True)
class Items:
    """The questions of a data set, each answered turn of a conversation being one, made when they are asked for.

    Args:
        dataset: what `open_conversations` returned.
        size: at most so many; None: all.
        candidates: what can be answered, where the data set does not say.
    Raises:
        DataError: two conversations have one id.
    """

    dataset: Any
    size: int | None = None
    candidates: tuple[str, ...] = ()
    places: list[tuple[int, int]] = field(default_factory=list)  # (sample, turn of the answer)

    def __post_init__(self) -> None:
        wanted = math.inf if self.size is None else self.size
        known: set[str] = set()
        for index, conversation in enumerate(_conversations(self.dataset)):
            if len(self.places) >= wanted:
                break
            _check_new(conversation.id, known)
            turns = conversation.turns
            self.places.extend((index, place) for place, turn in enumerate(turns) if turn.role == "assistant")
        if self.size is not None:
            del self.places[self.size :]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Item:
        index, place = self.places[number]
        return self._item(self.dataset[index], index, place)

    def read(self, numbers: Sequence[int]) -> list[Item]:
        """The items of those numbers, scenes drawn in one call.

        Args:
            numbers: places among the items.
        """
        places = [self.places[number] for number in numbers]
        indices = list(dict.fromkeys(index for index, _ in places))
        samples = dict(zip(indices, _read(self.dataset, indices), strict=True))
        return [self._item(samples[index], index, place) for index, place in places]

    def _item(self, sample: VlmSample, index: int, place: int) -> Item:
        conversation = sample.conversation
        turns = conversation.turns[:place]
        images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        rounds = sum(turn.role == "assistant" for turn in conversation.turns)
        turn = sum(each.role == "assistant" for each in turns)
        asked = replace(conversation, turns=turns, images=conversation.images[:images])
        id = conversation.id if rounds == 1 else f"{conversation.id}/{turn}"
        about = self.dataset.truth(index, turn) if hasattr(self.dataset, "truth") else {}
        answer = conversation.turns[place].text
        return Item(
            id,
            asked,
            sample.image[:images],
            str(about.get("task", "")),
            tuple(about.get("references") or (about.get("answer", answer),)),
            tuple(about.get("candidates", self.candidates)),
            about.get("family") or about.get("strategy"),
        )


def _check_new(id: str, known: set[str]) -> None:
    """Adds the id to those that are known; answers are told apart by theirs."""
    if id in known:
        raise DataError(f"several questions have the id {id!r}; give each its own")
    known.add(id)


def _read(dataset: Any, indices: Sequence[int]) -> list[VlmSample]:
    whole = getattr(dataset, "__getitems__", None)
    return whole(indices) if whole else [dataset[index] for index in indices]


def _conversations(dataset: Any) -> Iterator[Conversation]:
    """All conversations of a data set, in order."""
    if hasattr(dataset, "conversations"):
        yield from dataset.conversations
        return
    for first in range(0, len(dataset), CHUNK):
        for sample in _read(dataset, range(first, min(first + CHUNK, len(dataset)))):
            yield sample.conversation


def controlled(items: Items | Questions, numbers: Sequence[int], control: Control) -> list[Item]:
    """The items as a control shows them: the same questions about no image, or about another item's.

    What a model still answers right then, it knows without the image.

    Args:
        items: all of them.
        numbers: which.
        control: "none"; "blank": gray images; "shuffled": those of the first items after half the set that show
            something else, as many as there were.
    Raises:
        DataError: shuffled, and too few items show something else.
    """
    own = items.read(numbers)
    if control == "none":
        return own
    if control == "blank":
        return [replace(item, image=torch.full_like(item.image, GRAY)) for item in own]
    away = items.read([(number + len(items) // 2) % len(items) for number in numbers])
    return [
        replace(item, image=other.image if _differ(item, other) else _another(items, number, item))
        for number, item, other in zip(numbers, own, away, strict=True)
    ]


def _differ(item: Item, other: Item) -> bool:
    """Whether the other has as many images, none of them the item's."""
    return len(item.image) == len(other.image) and not _share(item, other)


def _share(item: Item, other: Item) -> bool:
    return any(torch.equal(one, another) for one in item.image for another in other.image)


def _another(items: Items | Questions, number: int, item: Item) -> Tensor:
    """[n, 3, H, W]: as many images as the item has, of one other item or of several."""
    found = item.image[:0]
    for step in range(len(items)):
        if len(found) >= len(item.image):
            return found[: len(item.image)]
        other = items[(number + len(items) // 2 + step) % len(items)]
        if not _share(item, other):
            found = torch.cat([found, other.image])
    if len(found) >= len(item.image):
        return found[: len(item.image)]
    raise DataError(f"--control shuffled: no item shows anything else than {item.id!r}; give more items")


class Questions:
    """The questions of a JSONL file about images in a folder, as LLaVA's and POPE's question files have them.

    A line is an object with "image", "text" or "question", and perhaps "question_id" or "id", "label" or "answer" (what
    is right) and "category" (a group).

    Args:
        path: the file.
        image_folder: where the images' names start.
        pixels: how images are prepared.
        size: at most so many; None: all.
        candidates: what can be answered to each.
    Raises:
        DataError: the file is not UTF-8, a line is not such an object, two have one id, or an image is missing.
    """

    def __init__(
        self,
        path: Path,
        image_folder: Path,
        pixels: Pixels,
        size: int | None = None,
        candidates: tuple[str, ...] = (),
    ) -> None:
        self._pixels, self._found = pixels, []
        known: set[str] = set()
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = _question(f"{path}:{number}", number, line)
                _check_new(item.id, known)
                self._found.append((replace(item, candidates=candidates), f"{path}:{number}"))
        self._found = self._found[:size]
        self._folder = image_folder
        for item, where in self._found:
            if not (image_folder / item.conversation.images[0]).is_file():
                raise DataError(f"{where}: there is no image {image_folder / item.conversation.images[0]}")

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Item:
        item, where = self._found[number]
        data, how = (self._folder / item.conversation.images[0]).read_bytes(), self._pixels
        return replace(
            item, image=load_vlm_image(data, how.image_hw, aspect=how.aspect, mean=how.image_mean, where=where)[None]
        )

    def read(self, numbers: Sequence[int]) -> list[Item]:
        """The items of those numbers.

        Args:
            numbers: places among the items.
        """
        return [self[number] for number in numbers]


def _question(where: str, number: int, line: str) -> Item:
    try:
        entry = json.loads(line)
        question, image = entry.get("question", entry.get("text")), entry.get("image")
    except (ValueError, AttributeError):
        question = image = None
    if not isinstance(question, str) or not isinstance(image, str):
        raise DataError(f'{where}: must be an object with "image" and "text" or "question"; got {line[:80]}')
    right = entry.get("label", entry.get("answer"))
    text = question if IMAGE_MARK in question else f"{IMAGE_MARK}\n{question}"
    conversation = Conversation(str(entry.get("question_id", entry.get("id", number))), (image,), (Turn("user", text),))
    return Item(
        conversation.id,
        conversation,
        torch.empty(0),
        references=() if right is None else (str(right),),
        group=entry.get("category"),
    )
