"""Small vocabularies in the forms of the language models that people use, trained on the spot."""

import functools
import json
import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlmfast.data.lm_tokenizer import LmTokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = re.findall(
    r"\S+",
    "a the red green blue cube ball cone left right of above under is are what how many things in this picture do you "
    "see USER ASSISTANT Human Assistant there small large 1 2 3 42 1999 yes no , . ? ! : ; - ( ) ### [INST] é ü ☃ 漢字 "
    "🙂",
)
GAPS = (" ", " ", " ", " ", "", "  ", "\n")


def words(rng: random.Random, longest: int) -> str:
    """Up to so many words and gaps, of which at least one is not white space."""
    return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(1, longest)))


def corpus() -> list[str]:
    rng = random.Random(0)
    curious = "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: "
    return [curious + words(rng, 30) for _ in range(200)]


@functools.cache
def sentencepiece_model(kind: str) -> str:
    """The `model` of a tokenizer.json with ▁ for spaces and bytes for what it does not know."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", show_progress=False)
    else:
        inner = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.train_from_iterator((text.replace("漢", "").replace("☃", "") for text in corpus()), trainer)
    learnt = json.loads(inner.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", "<pad>", *bytes_]
    if kind == "unigram":
        pieces = [[name, 0.0] for name in first] + [piece for piece in learnt["vocab"] if piece[0] != "<unk>"]
        return json.dumps(learnt | {"vocab": pieces, "unk_id": 0, "byte_fallback": True})
    vocab = {name: id for id, name in enumerate([*first, *learnt["vocab"]])}
    return json.dumps(learnt | {"vocab": vocab, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True})


def sentencepiece(kind: str = "bpe", *, legacy: bool = True) -> Tokenizer:
    """As Llama 2's tokenizer.json: with `legacy`, text behind a special token begins with a space of its own."""
    inner = Tokenizer(models.BPE())
    inner.add_special_tokens([])
    whole = json.loads(inner.to_str()) | {"model": json.loads(sentencepiece_model(kind))}
    inner = Tokenizer.from_str(json.dumps(whole))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@functools.cache
def _byte_level(split: str | None) -> str:
    inner = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    inner.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(), trainer)
    return inner.to_str()


def byte_level(*, bos: bool = True, split: str | None = None) -> Tokenizer:
    """As Llama 3's tokenizer.json with `bos` and LLAMA_3_WORDS, as GPT-2's without both."""
    inner = Tokenizer.from_str(_byte_level(split))
    trimming = processors.ByteLevel(trim_offsets=True)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.post_processor = processors.Sequence([trimming, start]) if bos else trimming
    return inner


VOCABULARIES = {
    "Llama 2": sentencepiece,
    "Unigram": lambda: sentencepiece("unigram"),
    "byte-level BPE": byte_level,
    "Llama 3": lambda: byte_level(split=LLAMA_3_WORDS),
}


def vocabulary(name: str) -> LmTokenizer:
    """One of VOCABULARIES, as ours."""
    return LmTokenizer(VOCABULARIES[name](), dict(NAMES))
