"""`vlmfast chat`: a conversation about images, in the terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmfast.data.conversation import IMAGE_MARK, Conversation, Turn
from vlmfast.data.templates import EOS, TEMPLATES
from vlmfast.errors import DataError, VlmfastError
from vlmfast.models.session import Session
from vlmfast.recipes.vlm_predict import Talker, VlmFlags, generation_options, open_talker

HELP = "/image PATH shows an image with the next question, /reset begins anew, /quit ends"


@dataclass(kw_only=True)
class Config(VlmFlags):
    """Talks about images: each line is a question, answered word by word with all that was said before in mind.

    For example:
        vlmfast chat --model logs/two --image photo.jpg
        vlmfast chat --model llava-1.5-7b-hf --image photo.jpg --precision bf16 --temperature 0.2
        printf 'What is in the picture?\\nHow many?\\n' | vlmfast chat --model logs/two --image photo.jpg

    /image PATH shows another image, /reset forgets everything, /quit ends. What was computed for earlier turns is kept.
    """

    image: tuple[Path, ...] = ()
    """Image files that the first question is about."""
    system: str = ""
    """What the model is told before the conversation. Default: the template's own sentence."""


def run(config: Config) -> None:
    """Reads questions from standard input, and writes answers to standard output.

    Args:
        config: the flags.
    Raises:
        DataError: no such model or image, or a question that does not fit the model's context; in a terminal the last
            two are told, and the conversation goes on.
    """
    talker = open_talker(config)
    chat = Chat(talker, config, lambda text: print(text, end="", flush=True), config.system)
    for path in config.image:
        chat.show(path)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{talker.source} ({talker.template}). {HELP}", file=sys.stderr)
    for line in _lines(terminal):
        try:
            if not chat.take(line):
                return
        except VlmfastError as error:
            if not terminal:
                raise
            print(error, file=sys.stderr)


class Chat:
    """A conversation that goes on: what was said, the images shown, and what the model computed of it.

    Args:
        talker: the model.
        flags: how it is to answer.
        write: called with each piece of an answer as it comes.
        system: what the model is told first; "": the template's own sentence.
    """

    def __init__(self, talker: Talker, flags: VlmFlags, write: Callable[[str], object], system: str = "") -> None:
        self._talker, self._write, self._system = talker, write, system
        self._options = generation_options(talker, flags)
        self.session = Session(talker.model)
        self.reset()

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.turns: list[Turn] = [Turn("system", self._system)] if self._system else []
        self._images: list[Tensor] = []  # [3, H, W] each
        self._names: list[str] = []
        self._waiting = 0  # images shown since the last question
        self.session.reset()

    def show(self, path: Path) -> None:
        """An image that the next question is about.

        Args:
            path: the file.
        Raises:
            DataError: there is no such file, or it is no image.
        """
        self._images.append(self._talker.image(path))
        self._names.append(str(path))
        self._waiting += 1

    def take(self, line: str) -> bool:
        """Whether the conversation goes on after this line: a question, or a command with a slash.

        Args:
            line: what was typed.
        Raises:
            DataError: an unknown command, an image that cannot be read, or a question that does not fit.
        """
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.reset()
        elif word == "/image":
            self.show(Path(rest.strip()).expanduser())
        elif word.startswith("/"):
            raise DataError(f"unknown command {word}: {HELP}")
        elif word:
            self.ask(line.strip())
        return True

    def ask(self, question: str) -> str:
        """The answer, which was written piece by piece as it came.

        Args:
            question: a user's turn.
        Raises:
            DataError: the conversation does not fit the model's context.
        """
        asked = Turn("user", f"{IMAGE_MARK}\n" * self._waiting + question)
        conversation = Conversation("chat", tuple(self._names), (*self.turns, asked))
        prompt = self._talker.prompt(conversation)
        prefix = self._talker.prefix(conversation)
        height, width = self._talker.model.image_hw
        images = torch.stack(self._images) if self._images else torch.empty(0, 3, height, width, dtype=torch.uint8)
        said = _Spoken(self._talker, self._write)
        with suppress(_EndedError, KeyboardInterrupt):  # an answer that was broken off stands as far as it went
            images = images.to(self._talker.device)
            self.session.ask(prompt, images, prefix=prefix, on_token=said.push, **self._options)
        text = said.finish()
        if text:  # to say nothing is no turn
            self.turns += [asked, Turn("assistant", text)]
            self._waiting = 0
        return text


class _EndedError(Exception):
    """The template's end mark was written."""


class _Spoken:
    """An answer that is shown as it comes, up to the template's end mark."""

    def __init__(self, talker: Talker, write: Callable[[str], object]) -> None:
        self._stream, self._write = talker.tokenizer.stream(), write
        self._end = TEMPLATES[talker.template].end.replace(EOS, talker.tokenizer.eos).strip(" ")
        self._text, self._shown = "", 0

    def push(self, row: int, token: int) -> None:
        self._text = (self._text + self._stream.push(token)).lstrip()
        if self._end and self._end in self._text:
            raise _EndedError
        # What may be the beginning of the mark waits, and so do spaces, which nothing may follow.
        self._show(len(self._text[: len(self._text) - max(len(self._end) - 1, 0)].rstrip()))

    def finish(self) -> str:
        self._text = (self._text + self._stream.finish()).partition(self._end or "\0")[0].rstrip()
        self._show(len(self._text))
        self._write("\n")
        return self._text

    def _show(self, end: int) -> None:
        if end > self._shown:
            self._write(self._text[self._shown : end])
            self._shown = end


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed, or comes through the pipe."""
    if not terminal:
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and arrow keys
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
