"""Captions -> token ids through the `tokenizers` library, by a vocabulary trained here or read from a file or folder.

In those trained here and in OpenAI's, every row is start, tokens, end, padding (0). The end token has the highest id of
all, so that a text tower may pool at `text.argmax(-1)` as CLIP does. No word is unknown: what the vocabulary lacks is
spelt in bytes. A folder of Hugging Face's keeps its own start, end and padding.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import string
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmfast.errors import DataError, missing_extra

PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"
START_OF_CLIP, END_OF_CLIP = "<|startoftext|>", "<|endoftext|>"
SPECIAL = ((START, END), (START_OF_CLIP, END_OF_CLIP))  # start and end: ours and open_clip's, Hugging Face's
CLIP_CONTEXT, CLIP_MERGES = 77, 49152 - 256 - 2  # open_clip takes that many merges of its file
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CONFIG_FILE = "tokenizer_config.json"  # beside a tokenizer.json of Hugging Face's
CLEAN_KEY = "vlmfast_clean"  # in it, how texts are cleaned first
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# How texts are cleaned: open_clip's three ways, SigLIP's in transformers, and not at all.
Clean: TypeAlias = Literal["lower", "whitespace", "canonicalize", "siglip", "none"]


def clean_text(text: str) -> str:
    """The text as open_clip cleans it: mojibake repaired, HTML entities resolved, single spaces, lower case.

    Args:
        text: a caption.
    Raises:
        MissingExtraError: ftfy is not installed.
    """
    return " ".join(_repaired(text).split()).lower()


def _repaired(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise missing_extra("ftfy", "data") from error
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else both leave it as it is
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text


CLEANERS: dict[str, Callable[[str], str]] = {
    "lower": clean_text,
    "whitespace": lambda text: " ".join(_repaired(text).split()),
    "canonicalize": lambda text: " ".join(_repaired(text).replace("_", " ").translate(NO_PUNCTUATION).lower().split()),
    "siglip": lambda text: " ".join(text.lower().translate(NO_PUNCTUATION).split()),
    "none": lambda text: text,
}


class Marks(NamedTuple):
    """The special tokens of a vocabulary of Hugging Face's, whose file says where they go."""

    start: str | None
    end: str
    pad: str


class Tokenizer:
    """Texts -> int64 [B, context_length].

    Args:
        inner: a `tokenizers.Tokenizer` with a start and an end token. Its truncation, padding and template are set.
        context_length: T, tokens a row with start and end, at least 2.
        clean: what texts go through first: "lower" (or True) `clean_text`; "whitespace" the same without lower case;
            "canonicalize" the same without punctuation, as open_clip does for SigLIP; "siglip" as transformers does for
            SigLIP, which repairs nothing; "none" (or False) nothing.
        marks: the special tokens, where the template stays as it is and the end need not have the highest id.

    Raises:
        DataError: no start and end token, or without `marks` the end token has not the highest id.
        ValueError: context_length < 2, or no such `clean`.
    """

    def __init__(
        self, inner: Any, context_length: int, *, clean: bool | Clean = True, marks: Marks | None = None
    ) -> None:
        from tokenizers.processors import TemplateProcessing

        if context_length < 2:
            raise ValueError(f"Tokenizer: context_length must be at least 2, for start and end; got {context_length}")
        self.clean = ("lower" if clean else "none") if isinstance(clean, bool) else clean
        if self.clean not in CLEANERS:
            raise ValueError(f"Tokenizer: clean must be one of {', '.join(CLEANERS)}; got {clean!r}")
        self.context_length = context_length
        self.vocab_size = max(inner.get_vocab().values()) + 1
        if marks is None:
            start, end = next(
                (pair for pair in SPECIAL if all(inner.token_to_id(name) is not None for name in pair)), (None, None)
            )
            if start is None or end is None:
                raise DataError(f"Tokenizer: the vocabulary has none of the pairs of start and end tokens {SPECIAL}")
            self.sot_id, self.eot_id, self.pad_id = inner.token_to_id(start), inner.token_to_id(end), 0
            if self.eot_id != self.vocab_size - 1:
                raise DataError(
                    f"Tokenizer: the end token {end!r} must have the highest id, which pooling at argmax finds; it has "
                    f"{self.eot_id} of {self.vocab_size} ids"
                )
            inner.post_processor = TemplateProcessing(
                single=f"{start} $A {end}", special_tokens=[(start, self.sot_id), (end, self.eot_id)]
            )
        else:
            ids = {name: inner.token_to_id(name) for name in marks if name is not None}
            if absent := [name for name, id in ids.items() if id is None]:
                raise DataError(f"Tokenizer: the vocabulary lacks the special tokens {', '.join(absent)}")
            self.eot_id, self.pad_id = ids[marks.end], ids[marks.pad]
            self.sot_id = None if marks.start is None else ids[marks.start]
        inner.enable_truncation(context_length)
        inner.enable_padding(pad_id=self.pad_id, pad_token=inner.id_to_token(self.pad_id), length=context_length)
        inner.encode_special_tokens = True  # "<end_of_text>" in a caption is spelt out: it must not end the text
        self._inner = inner

    def __call__(self, texts: str | Sequence[str], *, truncate: bool = True) -> Tensor:
        """[B, T] int64 token ids of the texts; one text makes one row.

        Args:
            texts: B texts.
            truncate: cut a text that is too long, the end token staying last; False raises instead.

        Returns:
            [B, T] int64: start, tokens, end, zeros.

        Raises:
            ValueError: a text needs more than T tokens and `truncate` is False.
        """
        texts = [texts] if isinstance(texts, str) else texts
        clean, marks = CLEANERS[self.clean], self._inner.num_special_tokens_to_add(False)
        rows = self._inner.encode_batch_fast([clean(text) for text in texts])
        for text, row in zip(texts, rows, strict=True):
            if row.overflowing and not truncate:
                length = marks + sum(sum(part.attention_mask) - marks for part in (row, *row.overflowing))
                raise ValueError(
                    f"Tokenizer: {text[:60]!r} needs {length} tokens with start and end; context_length is "
                    f"{self.context_length}. Shorten it, or set truncate=True"
                )
        ids = np.array([row.ids for row in rows], dtype=np.int64)
        return torch.from_numpy(ids.reshape(len(rows), self.context_length))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one row of ids, up to its end token."""
        numbers = [int(i) for i in ids]
        if self.eot_id in numbers:
            numbers = numbers[: numbers.index(self.eot_id)]
        return self._inner.decode([i for i in numbers if i != self.sot_id], skip_special_tokens=False)

    def settings(self) -> dict[str, Any]:
        """What Hugging Face's libraries want to know beside `tokenizer.json`, for the `tokenizer_config.json` there."""
        name = self._inner.id_to_token
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "bos_token": None if self.sot_id is None else name(self.sot_id),
            "eos_token": name(self.eot_id),
            "pad_token": name(self.pad_id),
            CLEAN_KEY: self.clean,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, whole or not at all; other libraries read it, but do not clean the text."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._inner.to_str(pretty=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._state() == other._state()

    __hash__ = None  # type: ignore[assignment]

    def _state(self) -> tuple[Any, ...]:
        return self.clean, json.loads(self._inner.to_str())


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int, *, clean: bool = True) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges come from `texts`; the same texts in any order give the same one.

    Args:
        texts: captions.
        vocab_size: V at most, with 256 bytes, pad, start and end; fewer if the texts have no more to merge.
        context_length: T, tokens a row with start and end.
        clean: whether texts go through `clean_text`, here and when the tokenizer is called.

    Returns:
        A Tokenizer; its `vocab_size` is the V to build a model with.

    Raises:
        ValueError: vocab_size < 259.
        MissingExtraError: tokenizers or ftfy is not installed.
    """
    tokenizers = _library()
    if vocab_size < 256 + 3:
        raise ValueError(
            f"train_tokenizer: vocab_size must be at least 259 (256 bytes, pad, start, end); got {vocab_size}"
        )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((clean_text(text) if clean else text for text in texts), trainer)
    inner.add_special_tokens([START, END])  # last, so that the end token's id is the highest
    return Tokenizer(inner, context_length, clean=clean)


def load_tokenizer(
    path: str | os.PathLike[str], context_length: int | None = None, *, clean: bool | Clean | None = None
) -> Tokenizer:
    """The tokenizer in a file or folder.

    Args:
        path: a `tokenizer.json` of ours or of Hugging Face's CLIP, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`, which
            lies in the open_clip and clip packages; or a model's folder. There, a tokenizer_config.json beside
            tokenizer.json (or vocab.json and merges.txt) names the special tokens of CLIP's, SigLIP's or BERT's.
        context_length: T; None takes the file's truncation length, or the folder's, or 77 if it has none.
        clean: see `Tokenizer`. None: as the folder's owner does, transformers or open_clip; "lower" for a file.

    Returns:
        A Tokenizer.

    Raises:
        DataError: no such file, not a tokenizer, or no end token with the highest id.
        MissingExtraError: tokenizers is not installed.
    """
    tokenizers = _library()
    path = Path(path)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return _from_folder(path, context_length, clean)
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"load_tokenizer: {path} is not a file")
    clean = "lower" if clean is None else clean
    if path.name.endswith((".txt", ".txt.gz")):
        return Tokenizer(_openai_bpe(path), context_length or CLIP_CONTEXT, clean=clean)
    inner = _read(tokenizers, path)
    length = context_length or (inner.truncation or {}).get("max_length", CLIP_CONTEXT)
    return Tokenizer(inner, length, clean=clean)


def _read(tokenizers: Any, path: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception for every fault of the file
        raise DataError(f"load_tokenizer: {path} is not a whole tokenizer.json: {error}") from error


def _from_folder(folder: Path, context_length: int | None, clean: bool | Clean | None) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer_config.json, special tokens and cleaning as its owner has them."""
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / CONFIG_FILE)}

    def named(*keys: str) -> str | None:
        found = next((config[key] for key in keys if config.get(key)), None)
        return found["content"] if isinstance(found, dict) else found

    end = named("eos_token", "sep_token")
    if end is None:
        raise DataError(f"load_tokenizer: {folder / CONFIG_FILE} names neither an eos_token nor a sep_token")
    path = folder / "tokenizer.json"
    inner = _read(_library(), path) if path.is_file() else _transformers_bpe(folder)
    if clean is None:
        text = _json(folder / "open_clip_config.json").get("model_cfg", {}).get("text_cfg")
        if text:  # open_clip cleans in its own way, whatever the tokenizer
            theirs = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
        else:
            theirs = "siglip" if str(config.get("tokenizer_class")).startswith("Siglip") else "none"
        clean = config.get(CLEAN_KEY, theirs)
    longest = config.get("model_max_length", CLIP_CONTEXT)
    length = context_length or (longest if longest < 2**20 else CLIP_CONTEXT)  # 10 ** 30 stands for "any"
    start = named("bos_token", "cls_token")
    marks = Marks(start if start in inner.get_vocab() else None, end, named("pad_token") or end)
    return Tokenizer(inner, length, clean=clean, marks=marks)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in the file, or an empty one if there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"load_tokenizer: {path} is not JSON: {error}") from error


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", "data") from error
    return tokenizers


def _openai_bpe(path: Path) -> Any:
    """OpenAI's CLIP tokenizer from its list of merges: a header line, then two tokens a line."""
    library = _library()
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        merges = [tuple(line.split()) for line in data.decode("utf-8").split("\n")[1 : CLIP_MERGES + 1] if line]
        vocab = [*_byte_letters(), *(letter + "</w>" for letter in _byte_letters()), *map("".join, merges), START, END]
        model = library.models.BPE({word: id for id, word in enumerate(vocab)}, merges, end_of_word_suffix="</w>")
    except Exception as error:  # gzip, UTF-8 and the library each have their own kinds
        raise DataError(f"load_tokenizer: {path} is not a whole list of BPE merges: {error}") from error
    inner = library.Tokenizer(model)
    inner.normalizer = library.normalizers.Lowercase()
    inner.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(CLIP_WORDS), "removed", invert=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = library.decoders.Sequence(
        [library.decoders.ByteLevel(), library.decoders.Replace("</w>", " "), library.decoders.Strip(" ", 0, 1)]
    )
    inner.add_special_tokens([START, END])
    return inner


def _transformers_bpe(folder: Path) -> Any:
    """What transformers' CLIPTokenizer makes of vocab.json and merges.txt, for folders without a tokenizer.json."""
    library = _library()
    try:
        model = library.models.BPE.from_file(
            str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>", unk_token=END_OF_CLIP
        )
    except Exception as error:  # the library raises a plain Exception for every fault of the files
        raise DataError(
            f"load_tokenizer: {folder} has no tokenizer.json, nor a whole vocab.json and merges.txt: {error}"
        ) from error
    inner = library.Tokenizer(model)
    normalizers, pre_tokenizers = library.normalizers, library.pre_tokenizers
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = library.Regex(r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_WORDS)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = library.decoders.ByteLevel()
    start, end = START_OF_CLIP, END_OF_CLIP
    inner.add_special_tokens([start, end])
    inner.post_processor = library.processors.RobertaProcessing(
        (end, inner.token_to_id(end)), (start, inner.token_to_id(start)), False, False
    )
    return inner


def _byte_letters() -> list[str]:
    """One printable letter a byte, in the order of OpenAI's vocabulary: itself if printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
