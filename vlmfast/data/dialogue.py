"""Conversations as token ids and labels, and batches of them, packed without padding.

Which tokens are supervised comes from the characters of the text: a token is, if it holds a character of an answer or
of the end mark behind it. `<image>` becomes as many ids as an image has features.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from string import punctuation
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.batch import MapDataset
from vlmfast.data.conversation import IMAGE_MARK, Conversation, check
from vlmfast.data.lm_tokenizer import LmTokenizer
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.data.templates import EOS, TEMPLATES, Template
from vlmfast.errors import DataError, ShapeError

IGNORED = -100  # the label of a token that is not supervised


@dataclass(frozen=True, eq=False)
class Dialogue:
    """One conversation as a model trains on it."""

    ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, the ids of the supervised tokens, else IGNORED; the first is always IGNORED
    rounds: int  # questions and answers in it; later ones, that did not fit, were left out
    images: int  # images in it, the conversation's first ones


@dataclass(frozen=True, eq=False)
class DialogueBatch:
    """B dialogues, one behind the other."""

    ids: Tensor  # [tokens] int64
    labels: Tensor  # [tokens] int64, aligned with ids; IGNORED where nothing is to be learnt
    image: Tensor  # [N, 3, H, W] uint8, the images of all dialogues, in the order of their marks
    cu_seqlens: Tensor  # [B + 1] int32, dialogue b is tokens cu_seqlens[b] .. cu_seqlens[b + 1]
    max_seqlen: int  # tokens of the longest dialogue
    prefix: Tensor  # [B] int64, tokens before the first supervised one
    num_supervised: Tensor  # [] float32, supervised tokens of the whole batch, in its pieces too
    index: Tensor  # [B] int64, the place of each dialogue in its data set
    num_images: Tensor  # [B] int64, images of each dialogue

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tokens(self) -> int:
        """Tokens of all dialogues together."""
        return len(self.ids)

    def split(self, size: int) -> list[DialogueBatch]:
        """The batch in pieces of `size` dialogues, in order, the last one shorter if it must be; views, not copies.

        Each piece has the `num_supervised` of the whole batch: losses divided by it add up to the loss of the batch.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"DialogueBatch.split: size must be at least 1; got {size}")
        return self._pieces([*range(0, len(self), size), len(self)])

    def split_tokens(self, max_tokens: int) -> list[DialogueBatch]:
        """The batch in pieces of as many dialogues as `max_tokens` tokens hold, in order; as `split` otherwise.

        Raises:
            ValueError: a dialogue alone is longer.
        """
        ends = self.cu_seqlens.tolist()
        cuts = [0]
        for b in range(len(self)):
            if ends[b + 1] - ends[b] > max_tokens:
                raise ValueError(
                    f"DialogueBatch.split_tokens: sample {int(self.index[b])} has {ends[b + 1] - ends[b]} tokens; a "
                    f"piece holds {max_tokens}. Prepare dialogues with max_tokens={max_tokens} at most"
                )
            if ends[b + 1] - ends[cuts[-1]] > max_tokens:
                cuts.append(b)
        return self._pieces([*cuts, len(self)])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DialogueBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def _pieces(self, cuts: list[int]) -> list[DialogueBatch]:
        """The dialogues cuts[i] .. cuts[i + 1], for each i."""
        ends = self.cu_seqlens.tolist()
        image_ends = [0, *self.num_images.cumsum(0).tolist()]
        pieces = []
        for start, stop in itertools.pairwise(cuts):
            tokens, rows = slice(ends[start], ends[stop]), slice(start, stop)
            pieces.append(
                DialogueBatch(
                    self.ids[tokens],
                    self.labels[tokens],
                    self.image[image_ends[start] : image_ends[stop]],
                    self.cu_seqlens[start : stop + 1] - ends[start],
                    max(ends[b + 1] - ends[b] for b in range(start, stop)),
                    self.prefix[rows],
                    self.num_supervised,
                    self.index[rows],
                    self.num_images[rows],
                )
            )
        return pieces


class Prepared(NamedTuple):
    """What `Dialogues` gives and `pack` takes: a dialogue with its images."""

    dialogue: Dialogue
    image: Tensor  # [n, 3, H, W] uint8


class Dialogues:
    """The samples of a data set as dialogues: what `batches(..., collate=pack)` reads.

    A conversation that cannot be trained on (see `supervise`) is skipped and counted; so is each whose last rounds were
    left out, though it is used. `skips` is the data set's own, if it has one.

    Args:
        dataset: a MapDataset of VlmSample.
        template: one of TEMPLATES, or its name.
        tokenizer, image_tokens, max_tokens: see `supervise`.

    Raises:
        ValueError: no such template.
        DataError: the tokenizer lacks a token of the template.
    """

    def __init__(
        self,
        dataset: MapDataset,
        template: Template | str,
        tokenizer: LmTokenizer,
        image_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        self.dataset, self.template = dataset, template_for(template, tokenizer)
        self._tokenizer, self._image_tokens, self._max_tokens = tokenizer, image_tokens, max_tokens
        self._draw: Any = getattr(dataset, "draw", lambda index, seed, epoch: dataset[index])
        self.skips: Skipped = getattr(dataset, "skips", None) or Skipped()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Prepared:
        """The dialogue at a place; an UnreadableError error says why there is none."""
        return self._prepared(self.dataset[index], index)

    def draw(self, index: int, seed: int, epoch: int) -> Prepared | None:
        """The dialogue at a place; None if it cannot be trained on, which is counted."""
        return self._tried(self._draw(index, seed, epoch), index)

    def draw_all(self, indices: list[int], seed: int, epoch: int) -> list[Prepared | None]:
        """What `draw` gives for each place; the data set is read in one call, if it can be."""
        if hasattr(self.dataset, "draw") or not hasattr(self.dataset, "__getitems__"):
            return [self.draw(index, seed, epoch) for index in indices]
        samples = self.dataset.__getitems__(indices)
        return [self._tried(sample, index) for sample, index in zip(samples, indices, strict=True)]

    @property
    def skipped(self) -> Counter[str]:
        """How many things were left out so far, by reason."""
        return self.skips.counts()

    def describe_skipped(self) -> str:
        """One line that tells what was skipped, with examples; empty if nothing was."""
        return self.skips.describe()

    def _tried(self, sample: Any, index: int) -> Prepared | None:
        """The dialogue of a sample; None if there is none, or it cannot be trained on, which is counted."""
        try:
            return None if sample is None else self._prepared(sample, index)
        except UnreadableError:
            return None

    def _prepared(self, sample: Any, index: int) -> Prepared:
        conversation, image = sample.conversation, sample.image
        if len(image) != len(conversation.images):
            raise ShapeError(
                f"Dialogues: sample {conversation.id!r} names {len(conversation.images)} images; its image is "
                f"{tuple(image.shape)}"
            )
        where = getattr(self.dataset, "path", "")
        try:
            dialogue = supervise(
                conversation, self.template, self._tokenizer, self._image_tokens, self._max_tokens, where=where
            )
        except UnreadableError as error:
            self.skips.add(index, error)
            raise
        rounds = _rounds(conversation)
        if dialogue.rounds < rounds:
            told = f"{dialogue.rounds} of {rounds} are used"
            cut = UnreadableError("rounds left out, beyond max_tokens", _name(conversation, where), told)
            self.skips.add(f"{index} cut", cut)
        return Prepared(dialogue, image[: dialogue.images])


def supervise(
    conversation: Conversation,
    template: Template | str,
    tokenizer: LmTokenizer,
    image_tokens: int,
    max_tokens: int | None = None,
    *,
    where: object = "",
) -> Dialogue:
    """The token ids of a conversation, and as labels those of its answers and of the end mark behind each.

    What is supervised is what a model has to write where a prompt ends: the space that a template has before an answer,
    the answer and the end mark. A token that lies across the edge of that is supervised: where the end mark is no token
    of its own, it is how an answer ends.
    A question without an answer at the end is left out. Too long a conversation is cut after its last whole round that
    fits, so never in an answer or an image.

    Args:
        conversation: see `check`.
        template: one of TEMPLATES, or its name.
        tokenizer: its beginning-of-text token, if it has one, comes once, at the front.
        image_tokens: P, how many times `image_token_id` stands for an image.
        max_tokens: T at most; None: as many as there are.
        where: the file that the conversation comes from, for errors.

    Returns:
        A Dialogue.

    Raises:
        UnreadableError: a reason of `check`, "special token in a turn", "more than one round" (template "plain"),
            "nothing to learn", or "longer than max_tokens": the first round alone is.
        DataError: the tokenizer lacks a token of the template.
        ValueError: no such template.
    """
    template = template_for(template, tokenizer)
    _check(conversation, template, tokenizer, where, answered=True)

    def first(rounds: int) -> tuple[np.ndarray, np.ndarray]:
        return _tokens(_first_rounds(conversation, rounds), template, tokenizer, image_tokens)

    rounds = _rounds(conversation)
    ids, labels = first(rounds)
    if max_tokens is not None and len(ids) > max_tokens:
        rounds = bisect.bisect_right(range(1, rounds), max_tokens, key=lambda some: len(first(some)[0]))
        ids, labels = first(max(rounds, 1))
        if not rounds:
            told = f"{len(ids)} tokens with the first answer; at most {max_tokens}"
            raise UnreadableError("longer than max_tokens", _name(conversation, where), told)
    labels[:1] = IGNORED  # nothing comes before it that could foretell it
    if (labels == IGNORED).all():
        raise UnreadableError("nothing to learn", _name(conversation, where), "its only token is the first")
    images = len(_first_rounds(conversation, rounds).images)
    return Dialogue(torch.from_numpy(ids), torch.from_numpy(labels), rounds, images)


def prompt_ids(
    conversation: Conversation,
    template: Template | str,
    tokenizer: LmTokenizer,
    image_tokens: int,
    max_tokens: int | None = None,
) -> Tensor:
    """The token ids of a conversation that ends with a question, up to where the answer begins.

    They are the ids that `supervise` puts before that answer.

    Args:
        conversation, template, tokenizer, image_tokens: see `supervise`.
        max_tokens: T at most, such as the context of a model less the tokens to generate; None: any.

    Returns:
        [T] int64.

    Raises:
        UnreadableError: a reason of `check`, "special token in a turn", or "prompt longer than the context".
        DataError: the tokenizer lacks a token of the template.
        ValueError: no such template.
    """
    template = template_for(template, tokenizer)
    _check(conversation, template, tokenizer, "", answered=False)
    ids, _ = _tokens(conversation, template, tokenizer, image_tokens)
    if max_tokens is not None and len(ids) > max_tokens:
        raise UnreadableError(
            "prompt longer than the context", _name(conversation), f"{len(ids)} tokens; at most {max_tokens}"
        )
    return torch.from_numpy(ids)


def stop_ids(template: Template | str, tokenizer: LmTokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's end of text, and the template's end mark where that is one token.

    A sign of punctuation and the mark in one token, such as ".\\n" in template plain, end it too: a model learnt to
    write that. The answer then lacks the sign. Where the mark is several tokens (`###` in some vocabularies), cut the
    text at `TEMPLATES[name].end`.

    Args:
        template: one of TEMPLATES, or its name.
        tokenizer: the model's.

    Returns:
        Token ids, ascending: what `generate` takes as `eos`.

    Raises:
        DataError: the tokenizer lacks a token of the template.
        ValueError: no such template.
    """
    template = template_for(template, tokenizer)
    mark, stops = template.end.replace(EOS, tokenizer.eos).strip(" "), {tokenizer.eos_id}
    for before in ("a", *(f"a{sign}" for sign in punctuation)):  # alone, SentencePiece would put a space before it
        ids, offsets = tokenizer.encode(before + mark)
        end = [id for id, (start, stop) in zip(ids, offsets, strict=True) if start >= 1 and stop > len(before)]
        if len(end) == 1:
            stops.add(end[0])
    return tuple(sorted(stops))


def template_for(template: Template | str, tokenizer: LmTokenizer) -> Template:
    """The template of that name, if the tokenizer has the tokens that it needs.

    Raises:
        DataError: it has not.
        ValueError: no such template.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ValueError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
        template = TEMPLATES[template]
    if template.end.startswith("<|") and tokenizer.token_id(template.end) is None:
        raise DataError(
            f"template {template.name!r} ends an answer with {template.end!r}, which the tokenizer lacks; use 'v1', or "
            f"train_lm_tokenizer with special=['<|im_start|>', '<|im_end|>']"
        )
    return template


def pack(prepared: list[Prepared], indices: list[int]) -> DialogueBatch:
    """The batch that holds the dialogues one behind the other: the `collate` of `batches`.

    Args:
        prepared: B dialogues, whose images all have one shape [3, H, W].
        indices: B places of theirs in their data set.

    Returns:
        A DialogueBatch on the CPU.

    Raises:
        ShapeError: the images differ in shape.
    """
    shapes = {tuple(image.shape[1:]): index for (_, image), index in zip(prepared, indices, strict=True)}
    if len(shapes) > 1:
        got = ", ".join(f"{shape} (sample {index})" for shape, index in shapes.items())
        raise ShapeError(f"pack: the images of a batch must have one shape [n, 3, H, W]; got {got} after n")
    lengths = [len(dialogue.ids) for dialogue, _ in prepared]
    labels = [dialogue.labels for dialogue, _ in prepared]
    return DialogueBatch(
        ids=torch.cat([dialogue.ids for dialogue, _ in prepared]),
        labels=torch.cat(labels),
        image=torch.cat([image for _, image in prepared]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        prefix=torch.tensor([int((row != IGNORED).int().argmax()) for row in labels]),
        num_supervised=torch.tensor(float(sum(int((row != IGNORED).sum()) for row in labels))),
        index=torch.tensor(indices, dtype=torch.int64),
        num_images=torch.tensor([dialogue.images for dialogue, _ in prepared]),
    )


def _name(conversation: Conversation, where: object = "") -> str:
    return f"{where} sample {conversation.id!r}".lstrip()


def _rounds(conversation: Conversation) -> int:
    """Answers in the conversation."""
    return sum(turn.role == "assistant" for turn in conversation.turns)


def _first_rounds(conversation: Conversation, rounds: int) -> Conversation:
    """The conversation up to so many answers, with the images of these."""
    system = int(conversation.turns[0].role == "system")
    turns = conversation.turns[: system + 2 * rounds]
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return replace(conversation, turns=turns, images=conversation.images[:images])


def _check(
    conversation: Conversation, template: Template, tokenizer: LmTokenizer, where: object, *, answered: bool
) -> None:
    check(conversation, where, answered=answered)
    for token in tokenizer.special - {IMAGE_MARK}:
        if any(token in turn.text for turn in conversation.turns):  # it would end an answer, or begin another turn
            raise UnreadableError("special token in a turn", _name(conversation, where), repr(token))
    if template.marks_only and _rounds(conversation) + (not answered) > 1:
        raise UnreadableError("more than one round", _name(conversation, where), f"template {template.name!r} has one")


def _tokens(
    conversation: Conversation, template: Template, tokenizer: LmTokenizer, image_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """[T] int64 ids and labels. The text between two images is tokenised by itself, as LLaVA does."""
    text, spans = template.render(conversation, bos=tokenizer.bos or "", eos=tokenizer.eos)
    taught = np.zeros(len(text) + 1, dtype=np.int64)  # [c] how many of the characters before c are supervised
    for start, end in spans:
        taught[start + 1 : end + 1] = 1
    taught = taught.cumsum()
    ids: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    supervised = [False] * len(ids)
    place = 0
    for chunk in text.split(IMAGE_MARK):
        if place:
            ids += [tokenizer.image_token_id] * image_tokens
            supervised += [False] * image_tokens
        found = tokenizer.encode(chunk)
        ids += found.ids
        supervised += [bool(taught[place + end] > taught[place + start]) for start, end in found.offsets]
        place += len(chunk) + len(IMAGE_MARK)
    array = np.array(ids, dtype=np.int64)
    return array, np.where(supervised, array, IGNORED)
