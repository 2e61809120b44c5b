"""Conversations about images: their turns, and LLaVA's JSON format, read and written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.images import Image, decode_image, fit_image
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.errors import DataError

IMAGE_MARK = "<image>"  # where an image stands in a user's turn
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of an image's channels, in 0 .. 1
MOST_PIXELS = 2**28  # of an image on its way to a square

Role = Literal["system", "user", "assistant"]
Aspect = Literal["pad", "square", "squash"]

EARLY = "answer before the first question"  # the reason to leave out that answer alone, as LLaVA does

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's name -> ours
_NAMES = {ours: theirs for theirs, ours in _ROLES.items()}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    text: str  # in a user's turn, IMAGE_MARK marks the place of an image


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about images: a system turn or none, then a user's and an assistant's in alternation."""

    id: str
    images: tuple[str, ...]  # names of the images, such as files, in the order of their marks
    turns: tuple[Turn, ...]


@dataclass(frozen=True, eq=False)
class VlmSample:
    """One conversation and its images: the item of a data set that a vision-language model trains on."""

    conversation: Conversation
    image: Tensor  # [n, 3, H, W] uint8, in the order of the marks; n = 0 for text alone


def check(conversation: Conversation, where: object = "", *, answered: bool = True) -> None:
    """Nothing, if a model can train on the conversation (or with `answered` False, answer it).

    Args:
        conversation: the turns.
        where: the file that it comes from, for the error.
        answered: there must be an answer; False: the last turn must be a question.

    Raises:
        UnreadableError: "unknown role", "turns out of order" (not a system turn or none, then question and answer in
            alternation), "empty question", "empty answer", "no assistant turn", "no question to answer", "image mark
            outside a question" or "number of image marks"; the message has the id.
    """
    where = f"{where} sample {conversation.id!r}".lstrip()
    turns = conversation.turns
    for number, turn in enumerate(turns):
        if turn.role not in _NAMES:
            raise UnreadableError("unknown role", where, f"turn {number} is of {turn.role!r}; known: {list(_NAMES)}")
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(talk):
        if turn.role != ("user", "assistant")[number % 2]:
            roles = ", ".join(turn.role for turn in turns)
            raise UnreadableError("turns out of order", where, f"got {roles[:100]}; user and assistant must alternate")
        if not turn.text.strip():
            what = "question" if turn.role == "user" else "answer"
            raise UnreadableError(f"empty {what}", where, f"turn {number + len(turns) - len(talk)}")
    if answered and len(talk) < 2:
        raise UnreadableError("no assistant turn", where, f"{len(turns)} turns")
    if not answered and len(talk) % 2 == 0:
        raise UnreadableError("no question to answer", where, "the last turn must be a user's")
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role != "user"):
        raise UnreadableError("image mark outside a question", where, f"{IMAGE_MARK} stands for a picture shown")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(conversation.images):
        raise UnreadableError(
            "number of image marks", where, f"{marks} times {IMAGE_MARK} for {len(conversation.images)} images"
        )


def put_images_first(conversation: Conversation) -> Conversation:
    """The conversation with the image of a question before its words, on a line of its own.

    A question with several images keeps them where they are.

    Source: what LLaVA's training does to its data, and LLaVA-NeXT's to questions with several images.
    """

    def moved(turn: Turn) -> Turn:
        if turn.role != "user" or turn.text.count(IMAGE_MARK) != 1:
            return turn
        return Turn("user", f"{IMAGE_MARK}\n{turn.text.replace(IMAGE_MARK, '').strip()}".strip())

    return replace(conversation, turns=tuple(moved(turn) for turn in conversation.turns))


def read_llava(path: str | os.PathLike[str], skips: Skipped | None = None) -> list[Conversation]:
    """The conversations of a file of LLaVA's format, in its order.

    A record is {"id", "image": name or list of names, "conversations": [{"from", "value"}, ...]}, from "human", "gpt"
    or "system"; without "image" it is text alone, without "id" its place in the file is its id. The file holds a JSON
    array of them, or one on each line. As LLaVA does, an answer before the first question is left out.

    Args:
        path: the file, UTF-8.
        skips: counts what cannot be used, by reason, and the answers left out; None: the first such raises.

    Returns:
        Conversations that `check` passes.

    Raises:
        DataError: no such file, not JSON (with the line), or not one record that can be used.
        UnreadableError: skips is None and a record cannot be used: "record not JSON", "record not an object", "missing
            key", "value not a text", "text not UTF-8", or a reason of `check`.
    """
    path = Path(path)
    found = []
    for where, record in _records(path, skips):
        try:
            conversation, early = _conversation(record, where)
            if early:
                error = UnreadableError(EARLY, f"{where} sample {conversation.id!r}")
                _count(skips, f"{where} first turn", error)
            check(conversation, where)
            found.append(conversation)
        except UnreadableError as error:
            _count(skips, where, error)
    if not found:
        told = f" {skips.describe()}" if skips else ""
        raise DataError(f"read_llava: {path} has no conversation that can be used.{told}")
    return found


def write_llava(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> None:
    """Writes a file of LLaVA's format, whole or not at all: a record a line if its name ends in .jsonl, else an array.

    Args:
        path: the file.
        conversations: what `read_llava` is to give again.

    Raises:
        UnreadableError: a conversation that `check` does not pass.
    """
    path = Path(path)
    lines = []
    for conversation in conversations:
        check(conversation, path)
        images = conversation.images
        record: dict[str, Any] = {"id": conversation.id}
        if images:
            record["image"] = images[0] if len(images) == 1 else list(images)
        record["conversations"] = [{"from": _NAMES[turn.role], "value": turn.text} for turn in conversation.turns]
        lines.append(json.dumps(record, ensure_ascii=False))
    text = "".join(line + "\n" for line in lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class LlavaJson:
    """The samples of a file of LLaVA's format and a folder of images: a data set for `batches`.

    What cannot be used is skipped and counted: a bad record when the file is read, an unreadable image when it is met.

    Args:
        path: see `read_llava`.
        image_folder: where the names of images start.
        image_hw, aspect, mean: see `load_vlm_image`.
        images_first: whether each goes through `put_images_first`.

    Raises:
        DataError: as `read_llava`, or image_folder is not a folder.
        ValueError: H and W differ or are below 1, or no such aspect.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str],
        image_hw: tuple[int, int],
        *,
        aspect: Aspect = "pad",
        mean: Sequence[float] = CLIP_MEAN,
        images_first: bool = True,
    ) -> None:
        _check_fit(image_hw, aspect)
        self.path, self.image_folder = Path(path), Path(image_folder)
        self.image_hw, self.aspect, self.mean = image_hw, aspect, tuple(mean)
        self.skips = Skipped()
        self.conversations = read_llava(path, self.skips)
        if images_first:
            self.conversations = [put_images_first(conversation) for conversation in self.conversations]
        if not self.image_folder.is_dir() and any(conversation.images for conversation in self.conversations):
            raise DataError(f"LlavaJson: {self.image_folder} is not a folder")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> VlmSample:
        """The sample at a place; an UnreadableError error says why an image of it cannot be read."""
        conversation = self.conversations[index]
        try:
            pixels = [self._pixels(name, conversation.id) for name in conversation.images]
        except UnreadableError as error:
            self.skips.add(index, error)
            raise
        return VlmSample(conversation, torch.stack(pixels) if pixels else torch.empty(0, 3, *self.image_hw).byte())

    def draw(self, index: int, seed: int, epoch: int) -> VlmSample | None:
        """The sample at a place; None if an image of it is unreadable, which is counted."""
        try:
            return self[index]
        except UnreadableError:
            return None

    def texts(self) -> Iterator[str]:
        """What is said in all conversations, turn by turn: what a tokenizer is trained on. No image is opened."""
        for conversation in self.conversations:
            yield from (turn.text for turn in conversation.turns)

    @property
    def skipped(self) -> Counter[str]:
        """How many things were left out so far, by reason."""
        return self.skips.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self.skips.describe()

    def _pixels(self, name: str, id: str) -> Tensor:
        path = self.image_folder / name
        where = f"{path} of sample {id!r} in {self.path}"
        try:
            data = path.read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise UnreadableError("missing image" if missing else "file not readable", where, str(error)) from error
        return load_vlm_image(data, self.image_hw, aspect=self.aspect, mean=self.mean, where=where)


def load_vlm_image(
    data: bytes,
    image_hw: tuple[int, int],
    *,
    aspect: Aspect = "pad",
    mean: Sequence[float] = CLIP_MEAN,
    where: object = "image",
) -> Tensor:
    """[3, H, W] uint8 RGB pixels of an encoded image, made square in one of LLaVA's ways.

    Args:
        data: the content of a JPEG, PNG, WebP, ... file.
        image_hw: (H, W) pixels; H = W.
        aspect: LLaVA's image_aspect_ratio. "pad": a square of `mean` around the whole image (LLaVA 1.5); "square": the
            middle of the image, as CLIP's processor cuts it (LLaVA 1); "squash": the whole image, out of shape.
        mean: colour of the padding, in 0 .. 1, the model's image_mean.
        where: the file's name, for the error.

    Returns:
        [3, H, W] uint8.

    Raises:
        UnreadableError: as `decode_image`, and "too many pixels" for an image so long and narrow that to make it square
            would take gigabytes.
        ValueError: H and W differ or are below 1, or no such aspect.
        MissingExtraError: Pillow is not installed.
    """
    _check_fit(image_hw, aspect)
    image = decode_image(data, where)
    long, short = max(image.size), min(image.size)
    unpacked = {"pad": long**2, "square": image_hw[0] ** 2 * long // short, "squash": 0}[aspect]
    if unpacked > MOST_PIXELS:
        told = f"{image.width} x {image.height}, {unpacked} in between; at most {MOST_PIXELS}"
        raise UnreadableError("too many pixels", where, told)
    if aspect == "pad":
        image = _padded(image, mean)
    image = fit_image(image, image_hw[0], "squash" if aspect == "squash" else "crop_floor")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check_fit(image_hw: tuple[int, int], aspect: str) -> None:
    if len(image_hw) != 2 or image_hw[0] != image_hw[1] or image_hw[0] < 1:
        raise ValueError(f"image_hw must be (H, W) with H = W >= 1; got {image_hw}")
    if aspect not in get_args(Aspect):
        raise ValueError(f"aspect must be one of {', '.join(get_args(Aspect))}; got {aspect!r}")


def _padded(image: Image, mean: Sequence[float]) -> Image:
    """The image in the middle of a square of the mean colour, an odd remainder halved downwards, as LLaVA does."""
    import PIL.Image

    side = max(image.size)
    square = PIL.Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _count(skips: Skipped | None, where: str, error: UnreadableError) -> None:
    if skips is None:
        raise error
    skips.add(where, error)


def _records(path: Path, skips: Skipped | None) -> Iterator[tuple[str, Any]]:
    """(place in the file, record) of each record."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"read_llava: {path} is not a file of UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path}[{number}]", record) for number, record in enumerate(json.loads(text)))
        except json.JSONDecodeError as error:
            raise DataError(f"read_llava: {path}:{error.lineno}: not JSON: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                _count(skips, f"{path}:{number}", UnreadableError("record not JSON", f"{path}:{number}", str(error)))
                continue
            yield f"{path}:{number}", record


def _conversation(record: Any, where: str) -> tuple[Conversation, bool]:
    """The conversation of a record, and whether an answer before its first question was left out."""
    if not isinstance(record, dict):
        raise UnreadableError("record not an object", where, f"got a {type(record).__name__}")
    named = record.get("id") is not None
    id = str(record["id"]) if named else Path(where).name
    where = f"{where} sample {id!r}" if named else where
    images = record.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise UnreadableError("missing key", where, 'a list "conversations"')
    said = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise UnreadableError("missing key", where, f'"from" and "value" of turn {number}')
        role, text = turn["from"], turn["value"]
        for value in (role, text):
            if not isinstance(value, str):
                raise UnreadableError("value not a text", where, f"turn {number} has a {type(value).__name__}")
        if not _is_utf8(text):
            raise UnreadableError("text not UTF-8", where, f"turn {number} has half a surrogate pair")
        if role not in _ROLES:
            raise UnreadableError("unknown role", where, f"turn {number} is from {role!r}; known: {list(_ROLES)}")
        said.append(Turn(_ROLES[role], text))
    if not all(isinstance(name, str) and name for name in images):
        raise UnreadableError("value not a text", where, '"image" must be a name or a list of names')
    if not all(_is_utf8(name) and "\0" not in name for name in (id, *images)):
        raise UnreadableError("text not UTF-8", where, "its id or the name of an image")
    first = int(bool(said) and said[0].role == "system")
    early = len(said) > first and said[first].role == "assistant"
    if early:
        del said[first]
    return Conversation(id, tuple(images), tuple(said)), early


def _is_utf8(text: str) -> bool:
    """Whether the text can be written; JSON may spell what cannot, such as half of a character's two escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
