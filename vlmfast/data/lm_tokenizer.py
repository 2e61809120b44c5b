"""Text <-> token ids for language models, with the place in the text of every token.

A tokenizer.json of Hugging Face's (Llama, GPT-2, Qwen2, ...) through the `tokenizers` library, or a vocabulary trained
here. The beginning-of-text token is never put in by `encode`: `dialogue` puts it once at the front of a conversation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmfast.data.conversation import IMAGE_MARK
from vlmfast.errors import DataError, missing_extra

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # of a vocabulary trained here, with ids 0, 1, 2; IMAGE_MARK has 3
FILES = ("tokenizer.json", "tokenizer_config.json")  # what `save` writes
UNFINISHED = "\ufffd"  # what bytes decode to that are not yet a whole character


class Encoding(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # the characters [start, end) of the text that each token stands for


class LmTokenizer:
    """Texts -> token ids and back. Made by `load_lm_tokenizer` and `train_lm_tokenizer`.

    Attributes: `bos_id` (None if texts of this vocabulary begin with nothing special), `eos_id`, `pad_id`,
    `image_token_id` (stands for one image feature), `bos` and `eos` (their texts), `special` (all special tokens),
    `vocab_size` (the highest id + 1), `added` (tokens that the files lacked and that were put in: a model's embedding
    needs rows for them).

    Args:
        inner: a `tokenizers.Tokenizer`.
        config: what a tokenizer_config.json says: the texts of eos_token and pad_token.

    Raises:
        DataError: config names no end-of-text token, or one that is not in the vocabulary; or "a" cannot be spelt in
            it.
    """

    def __init__(self, inner: Any, config: dict[str, Any]) -> None:
        inner.no_padding()
        inner.no_truncation()
        eos = _content(config.get("eos_token"))
        if eos is None:
            raise DataError(
                "LmTokenizer: no eos_token is named, so an answer would have no end. Name one in the config"
            )
        self.added = () if inner.token_to_id(IMAGE_MARK) is not None else (IMAGE_MARK,)
        inner.add_special_tokens([IMAGE_MARK])
        start = _encoded(inner, "a")
        bos = inner.id_to_token(start.ids[0]) if start.special_tokens_mask[0] else None
        self.bos, self.eos = bos, eos
        pad = _content(config.get("pad_token")) or eos
        self.eos_id, self.pad_id, self.image_token_id = (_id(inner, name) for name in (eos, pad, IMAGE_MARK))
        self.bos_id = None if bos is None else _id(inner, bos)
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.special = frozenset(
            token.content for token in inner.get_added_tokens_decoder().values() if token.special
        ) | {name for name in (bos, eos) if name}
        self._inner, self._config, self._template = inner, config, json.loads(inner.to_str())["post_processor"]
        inner.post_processor = None  # else a byte-level one cuts spaces off the offsets

    def encode(self, text: str) -> Encoding:
        """The tokens of the text, with nothing put before or after; the names of special tokens in it are those tokens.

        Args:
            text: any text.

        Returns:
            An Encoding. Offsets count characters of `text`. Tokens that spell one character in bytes all have its
            offsets, or in a Unigram vocabulary those of all the unknown characters that stand together there.

        Raises:
            DataError: the vocabulary has no token for a part of the text, not even an unknown one.
        """
        found = _encoded(self._inner, text, add_special_tokens=False)
        return Encoding(found.ids, found.offsets)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of the tokens.

        Args:
            ids: token ids, such as a Generation's.
            skip_special: leave special tokens out.
        """
        return self._inner.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def stream(self) -> TextStream:
        """A new TextStream, which turns tokens into text one by one."""
        return TextStream(self)

    def token_id(self, token: str) -> int | None:
        """The id of the token that is spelt so, special or not; None if there is none."""
        return self._inner.token_to_id(token)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load_lm_tokenizer` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        inner = json.loads(self._inner.to_str()) | {"post_processor": self._template}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, "image_token": IMAGE_MARK}
        for name, content in zip(FILES, (inner, config), strict=True):
            part = folder / f"{name}.part"
            part.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(part, folder / name)


class TextStream:
    """Text that grows token by token: what `LmTokenizer.stream` returns.

    A character spelt in several tokens comes out with the last of them. The pieces put together are `decode` of all.
    """

    def __init__(self, tokenizer: LmTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._told = 0, 0  # ids before _told are out; those from _from on are decoded again for the spaces

    def push(self, id: int) -> str:
        """The text that this token completes; empty while a character is unfinished.

        Args:
            id: the next token.
        """
        self._ids.append(int(id))
        new = self._new()
        if not new or new.endswith(UNFINISHED):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return new

    def finish(self) -> str:
        """What is left: the bytes of a character that never came to its end, as replacement characters."""
        new = self._new()
        self._from = self._told = len(self._ids)
        return new

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[self._from : self._told])
        return self._tokenizer.decode(self._ids[self._from :])[len(before) :]


def train_lm_tokenizer(texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = ()) -> LmTokenizer:
    """A byte-level BPE tokenizer whose merges come from `texts`; the same texts in any order give the same one.

    Args:
        texts: what a model will read and write. No word is unknown: what lacks a merge is spelt in bytes.
        vocab_size: V at most, with 256 bytes and the special tokens; fewer if the texts have no more to merge.
        special: further special tokens, such as those that a template names.

    Returns:
        An LmTokenizer with padding 0, beginning 1, end 2 and `<image>` 3.

    Raises:
        ValueError: vocab_size leaves no room for the bytes and the special tokens.
        MissingExtraError: tokenizers is not installed.
    """
    library = _library()
    names = [PAD, BOS, EOS, IMAGE_MARK, *special]
    if vocab_size < 256 + len(names):
        raise ValueError(
            f"train_lm_tokenizer: vocab_size must be at least {256 + len(names)} (256 bytes, {len(names)} special "
            f"tokens); got {vocab_size}"
        )
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = library.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return LmTokenizer(inner, {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})


def load_lm_tokenizer(folder: str | os.PathLike[str]) -> LmTokenizer:
    """The tokenizer of a model's folder: one that `save` wrote, or Hugging Face's of a Llama, GPT-2, Qwen2, LLaVA, ...

    A text ends with the eos_token of tokenizer_config.json or special_tokens_map.json, and begins with what the
    template of tokenizer.json puts there, if anything; `add_bos_token` says nothing beside that, as in transformers 5.
    Tokens of added_tokens.json and of `added_tokens_decoder` that tokenizer.json lacks are put in, with their ids.

    Args:
        folder: has tokenizer.json and tokenizer_config.json.

    Returns:
        An LmTokenizer; its `added` tells whether `<image>` had to be put in.

    Raises:
        DataError: no tokenizer.json or one that is not whole, no end-of-text token, or an added token whose id would
            not be the one that the folder says.
        MissingExtraError: tokenizers is not installed.
    """
    folder = Path(folder)
    path = folder / FILES[0]
    if not path.is_file():
        raise DataError(
            f"load_lm_tokenizer: {path} is not a file. A folder with tokenizer.model or vocab.json alone gets one by "
            "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        inner = _library().Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception for every fault of the file
        raise DataError(f"load_lm_tokenizer: {path} is not a whole tokenizer.json: {error}") from error
    config = _json(folder / "special_tokens_map.json") | _json(folder / FILES[1])
    listed = {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    listed = {id: token for token, id in _json(folder / "added_tokens.json").items()} | listed
    for id, token in sorted(listed.items()):
        if inner.token_to_id(_content(token)) is None:
            special = token.get("special", False) if isinstance(token, dict) else True
            (inner.add_special_tokens if special else inner.add_tokens)([_content(token)])
        if inner.token_to_id(_content(token)) != id:
            raise DataError(
                f"load_lm_tokenizer: {folder} gives the added token {_content(token)!r} the id {id}; in tokenizer.json "
                f"it is {inner.token_to_id(_content(token))}"
            )
    try:
        return LmTokenizer(inner, config)
    except DataError as error:
        raise DataError(f"load_lm_tokenizer: {folder}: {error}") from error


def _content(token: Any) -> str | None:
    """The text of a token that Hugging Face's files hold as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _encoded(inner: Any, text: str, **options: bool) -> Any:
    try:
        return inner.encode(text, **options)
    except Exception as error:  # the library raises a plain Exception
        raise DataError(
            f"LmTokenizer: the text {text[:40]!r} cannot be spelt in this vocabulary: {error}. It needs an unknown "
            "token, or tokens for all bytes"
        ) from error


def _id(inner: Any, token: str) -> int:
    id = inner.token_to_id(token)
    if id is None:
        raise DataError(f"LmTokenizer: the special token {token!r} is not in the vocabulary")
    return id


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in the file, or an empty one if there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"load_lm_tokenizer: {path} is not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"load_lm_tokenizer: {path} must hold an object; got {str(found)[:40]}")
    return found


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", "data") from error
    return tokenizers
