"""What a vision-language model answers: to one question, to all of a data set, and in likelihood over candidates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vlmfast.data.conversation import IMAGE_MARK, Aspect, Conversation, Turn, load_vlm_image
from vlmfast.data.dialogue import prompt_ids, stop_ids, supervise
from vlmfast.data.lm_tokenizer import LmTokenizer, load_lm_tokenizer
from vlmfast.data.templates import EOS, TEMPLATES
from vlmfast.errors import DataError
from vlmfast.eval.predictions import Prediction
from vlmfast.models.generation import Generation
from vlmfast.models.vlm import Vlm
from vlmfast.models.weights.vlm import load_vlm
from vlmfast.recipes.sources import pick_device
from vlmfast.recipes.vlm_data import Control, Item, Items, Pixels, Questions, controlled

MODEL_FOLDER = "model"  # in a run's folder
CONVERSATION_FILE = "conversation.json"  # in a model's folder: how it was trained to talk
TEMPLATE = "v1"  # of a model that does not say


@dataclass(kw_only=True)
class VlmFlags:
    """Which model, and how it answers."""

    model: Path | None = None
    """A run of vlmfast train --task, a model's folder in one, or a LLaVA of Hugging Face's."""
    template: str = ""
    """How a conversation is written: plain, v0, v1, bare, llama_2, mistral, mpt, chatml. Default: as the model was
    trained, else v1."""
    image_aspect_ratio: Aspect | None = None
    """pad, square or squash. Default: the model's own."""
    max_new_tokens: int = 128
    """Longest answer."""
    num_beams: int = 1
    """Hypotheses kept; 1 is greedy."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability / tokens ** length_penalty."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn."""
    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities add up to this."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 64
    """Questions at a time."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    precision: str = "fp32"
    """fp32 or bf16: of the weights and of all that is computed."""


@dataclass(frozen=True)
class Talker:
    """A model that is ready to answer, with its tokenizer and its way to write a conversation."""

    model: Vlm
    tokenizer: LmTokenizer
    template: str
    source: str = ""  # where it came from

    @property
    def pixels(self) -> Pixels:
        """How images are prepared for the model."""
        return Pixels(self.model.image_hw, self.model.image_mean, cast(Aspect, self.model.aspect))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def prompt(self, conversation: Conversation) -> Tensor:
        """[T] int64 on the model's device: the conversation, which ends with a question, up to the answer.

        Args:
            conversation: see `vlmfast.data.dialogue.prompt_ids`.
        Returns:
            Token ids.
        """
        room = self.model.decoder.config.context_length - 1
        ids = prompt_ids(conversation, self.template, self.tokenizer, self.model.image_tokens, room)
        return ids.to(self.device)

    def prefix(self, conversation: Conversation) -> int:
        """How many tokens stand before a conversation's first answer: those that see each other in a prefix-LM.

        Args:
            conversation: as for `prompt`.
        """
        turns = tuple(takewhile(lambda turn: turn.role != "assistant", conversation.turns))
        images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        return len(self.prompt(replace(conversation, turns=turns, images=conversation.images[:images])))

    def text(self, tokens: Tensor) -> str:
        """The answer that the tokens spell, without the template's end mark.

        Args:
            tokens: [n] int64, of a Generation.
        """
        end = TEMPLATES[self.template].end.replace(EOS, self.tokenizer.eos).strip(" ")
        text = self.tokenizer.decode(tokens.tolist())
        return (text.partition(end)[0] if end else text).strip()

    def image(self, path: Path) -> Tensor:
        """[3, H, W] uint8: the image file as the model takes it.

        Args:
            path: an image.
        Returns:
            Pixels.
        Raises:
            DataError: there is no such file, or it is no image.
        """
        if not path.is_file():
            raise DataError(f"{path}: there is no such image")
        how = self.pixels
        return load_vlm_image(path.read_bytes(), how.image_hw, aspect=how.aspect, mean=how.image_mean, where=path)


def open_talker(flags: VlmFlags) -> Talker:
    """The model that the flags name, in evaluation mode.

    Args:
        flags: --model, --template, --image-aspect-ratio, --device and --precision.
    Raises:
        DataError: no --model, nothing of the kind there, no such template, or a tokenizer of another vocabulary.
    """
    if flags.model is None:
        raise DataError("needs --model: a run of vlmfast train --task, or a folder of Hugging Face's LLaVA")
    if flags.precision not in ("fp32", "bf16"):
        raise DataError(f"--precision must be fp32 or bf16; got {flags.precision!r}")
    folder = flags.model / MODEL_FOLDER if (flags.model / MODEL_FOLDER).is_dir() else flags.model
    if (flags.model / "checkpoints").is_dir() and folder == flags.model:
        raise DataError(f"{flags.model}: the run has not come to its end: it holds no {MODEL_FOLDER}/")
    device = pick_device(flags.device)
    model = load_vlm(folder, device=device, dtype=torch.float32 if flags.precision == "fp32" else torch.bfloat16)
    tokenizer = load_lm_tokenizer(folder)
    check_vocabulary(model, tokenizer, folder)
    told = folder / CONVERSATION_FILE
    template = flags.template or (json.loads(told.read_text())["template"] if told.is_file() else TEMPLATE)
    if template not in TEMPLATES:
        raise DataError(f"--template must be one of {', '.join(TEMPLATES)}; got {template!r}")
    if flags.image_aspect_ratio is not None:
        model.aspect = flags.image_aspect_ratio
    return Talker(model, tokenizer, template, str(flags.model))


def check_vocabulary(model: Vlm, tokenizer: LmTokenizer, folder: Path) -> None:
    """Nothing, if the tokenizer's ids are the model's.

    Args:
        model: whose embedding has a row for each id.
        tokenizer: that is to go with it.
        folder: that the tokenizer came from.
    Raises:
        DataError: it has more ids than the model, or another one for images.
    """
    V = model.decoder.config.vocab_size
    if tokenizer.vocab_size > V or tokenizer.image_token_id != model.image_token_id:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and {tokenizer.image_token_id} for {IMAGE_MARK}; "
            f"the model has {V} and {model.image_token_id}: they are not of one model"
        )


def answers(talker: Talker, items: Sequence[Item], flags: VlmFlags) -> list[Generation]:
    """What the model writes after each question.

    Args:
        talker: the model.
        items: the questions.
        flags: how it is to write.
    """
    return talker.model.generate(
        [talker.prompt(item.conversation) for item in items],
        [item.image.to(talker.device) for item in items],
        prefix=_prefixes(talker, items),
        **generation_options(talker, flags),
    )


def generation_options(talker: Talker, flags: VlmFlags) -> dict[str, Any]:
    """The flags as `vlmfast.models.generate` takes them.

    Args:
        talker: whose end marks stop an answer.
        flags: how it is to write.
    """
    return {
        "max_new_tokens": flags.max_new_tokens,
        "eos": stop_ids(talker.template, talker.tokenizer),
        "beams": flags.num_beams,
        "length_penalty": flags.length_penalty,
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "top_k": flags.top_k,
        "seed": flags.seed,
    }


def likelihoods(talker: Talker, items: Sequence[Item]) -> list[dict[str, float]]:
    """Each candidate's probability, question by question: a softmax over how likely each is, its end included.

    Args:
        talker: the model.
        items: questions with candidates.
    """
    prompts = [talker.prompt(item.conversation) for item in items]
    continuations = [
        [_continuation(talker, item, prompt, candidate) for candidate in item.candidates]
        for item, prompt in zip(items, prompts, strict=True)
    ]
    images = [item.image.to(talker.device) for item in items]
    scores = talker.model.score(prompts, images, continuations, prefix=_prefixes(talker, items))
    return [
        dict(zip(item.candidates, score.double().softmax(0).tolist(), strict=True))
        for item, score in zip(items, scores, strict=True)
    ]


def _prefixes(talker: Talker, items: Sequence[Item]) -> list[int] | None:
    return [talker.prefix(item.conversation) for item in items] if talker.model.prefix_lm else None


def _continuation(talker: Talker, item: Item, prompt: Tensor, candidate: str) -> Tensor:
    """[n] int64: the candidate and its end mark, as the model would write them after the prompt."""
    turns = (*item.conversation.turns, Turn("assistant", candidate))
    whole = supervise(
        replace(item.conversation, turns=turns), talker.template, talker.tokenizer, talker.model.image_tokens
    )
    return whole.ids[len(prompt) :].to(prompt.device)


def predict(
    talker: Talker, items: Items | Questions, flags: VlmFlags, *, control: Control = "none", rank: bool = False
) -> Iterator[list[Prediction]]:
    """The model's answers, a batch after the other.

    Args:
        talker: the model.
        items: what is asked.
        flags: how it is to answer.
        control: what the questions are shown with; see `controlled`.
        rank: choose among the candidates, where a question has some, instead of writing.
    """
    for first in range(0, len(items), flags.batch_size):
        shown = controlled(items, range(first, min(first + flags.batch_size, len(items))), control)
        yield answer(talker, shown, flags, rank=rank, meta={"control": control})


def answer(
    talker: Talker, items: Sequence[Item], flags: VlmFlags, *, rank: bool = False, meta: dict[str, Any] | None = None
) -> list[Prediction]:
    """The model's answers to a few questions.

    Args:
        talker: the model.
        items: what is asked.
        flags: how it is to answer.
        rank: choose among the candidates, where a question has some, instead of writing.
        meta: what else a reader wants to know of the predictions.
    Raises:
        DataError: a probability is NaN; the item is named.
    """
    told = {"model": talker.source, "template": talker.template, "seed": flags.seed, **(meta or {})}
    ranked = [item for item in items if rank and item.candidates]
    written = [item for item in items if not (rank and item.candidates)]
    found: dict[int, Prediction] = {}
    for item, probs in zip(ranked, likelihoods(talker, ranked) if ranked else [], strict=True):
        best = max(probs, key=lambda candidate: probs[candidate])
        found[id(item)] = _prediction(item, best, probs[best], probs, told)
    for item, generation in zip(written, answers(talker, written, flags) if written else [], strict=True):
        # The probability of this very answer, its end included; of one that was cut off, as far as it goes.
        score = math.exp(min(float(generation.log_probs.sum()), 0.0))
        found[id(item)] = _prediction(item, talker.text(generation.tokens), score, None, told)
    return [found[id(item)] for item in items]


def _prediction(
    item: Item, text: str, score: float, probs: dict[str, float] | None, meta: dict[str, Any]
) -> Prediction:
    if math.isnan(score):
        raise DataError(
            f"item {item.id!r}: the model gives its answer no probability but NaN: a weight is not finite, or the "
            "numbers grew beyond --precision; try fp32"
        )
    shown = {"images": list(item.conversation.images), "question": item.question}
    return Prediction(
        id=item.id,
        prediction=text,
        task=item.task,
        input=shown,
        score=score,
        probs=probs,
        references=item.references,
        group=item.group,
        meta=meta,
    )


def ask(images: Sequence[Path], talker: Talker, question: str, candidates: Iterable[str] = ()) -> Item:
    """A question about image files, all of which it is shown at once.

    Args:
        images: files.
        talker: whose images they become.
        question: what is asked.
        candidates: possible answers.
    """
    text = IMAGE_MARK * len(images) + "\n" + question if images else question
    conversation = Conversation(
        images[0].stem if images else "question", tuple(map(str, images)), (Turn("user", text),)
    )
    pixels = [talker.image(path) for path in images]
    height, width = talker.model.image_hw
    image = torch.stack(pixels) if pixels else torch.empty(0, 3, height, width, dtype=torch.uint8)
    return Item(conversation.id, conversation, image, candidates=tuple(candidates))
