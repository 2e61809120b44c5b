"""The same ids as open_clip's and transformers' own tokenizers. Skipped where they are not installed."""

import json
import random

import pytest
import torch

from vlmfast.data.tokenize import CLEANERS, load_tokenizer, train_tokenizer
from vlmfast.errors import DataError

WORDS = [
    "cat",
    "Dog's",
    "RED",
    "l'été",
    "“quoted”",
    "&amp;lt;",
    "ﬁne",
    "3.14",
    "a_b",
    "猫",
    "schÃ¶n",
    "!?",
    "\t",
    "İ",
    "ß",
]
WORDS += ["don't", "it'll", "co-op", "hello,world", "½", "e\u0301", "🐈", "x" * 40]
DRAW = random.Random(0)
TEXTS = ["", " ", "a photo of a cat."]
TEXTS += [" ".join(DRAW.choices(WORDS, k=DRAW.randrange(1, 30))) for _ in range(200)]
LENGTH = 16


def clip_vocabulary():
    """OpenAI's bytes, a few merges and the two special tokens."""
    from vlmfast.data.tokenize import _byte_letters

    letters = _byte_letters()
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("d", "o"), ("Ã", "©")]
    names = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {name: id for id, name in enumerate(names)}, merges


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_clips_folder(transformers, files, tmp_path):
    vocabulary, merges = clip_vocabulary()
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    theirs.save_pretrained(tmp_path)
    if files != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    ours = load_tokenizer(tmp_path)
    assert (ours.context_length, ours.clean, ours.pad_id) == (LENGTH, "none", ours.eot_id)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS), expected)
    assert (ours(TEXTS) == ours.eot_id).any(1).all()
    with pytest.raises(ValueError, match=r"needs \d+ tokens with start and end; context_length is 16"):
        ours(TEXTS, truncate=False)
    longer = theirs(TEXTS, padding="max_length", truncation=True, max_length=50, return_tensors="pt").input_ids
    assert torch.equal(load_tokenizer(tmp_path, 50)(TEXTS), longer)


@pytest.mark.filterwarnings("ignore")  # another library's
def test_berts_folder(transformers, tmp_path):
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "photo",
        "of",
        "cat",
        "dog",
        "##s",
        ".",
        "'",
        "s",
        "red",
    ]
    theirs = transformers.BertTokenizer(vocab={name: id for id, name in enumerate(names)}, model_max_length=LENGTH)
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.sot_id, ours.eot_id) == (0, 2, 3)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS), expected)


def siglip_folder(transformers, folder):
    """What timm's SigLIP repositories hold: a T5 vocabulary, which ends texts and pads them with the same token."""
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator([CLEANERS["canonicalize"](text) for text in TEXTS], trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # another library's
def test_siglips_folder_of_open_clip(transformers, open_clip, tmp_path):
    siglip_folder(transformers, tmp_path)
    text = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    ours = load_tokenizer(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), LENGTH, clean="canonicalize")
    assert (ours.clean, ours.eot_id, ours.pad_id, ours.sot_id) == ("canonicalize", 1, 1, None)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"width": 8}}}))
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), LENGTH)
    assert torch.equal(load_tokenizer(tmp_path)(TEXTS), theirs(TEXTS))


@pytest.mark.filterwarnings("ignore")  # another library's
def test_siglips_folder_of_transformers_is_cleaned_as_there(transformers, tmp_path):
    siglip_folder(transformers, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "SiglipTokenizer"}))
    ours = load_tokenizer(tmp_path)
    assert ours.clean == "siglip"
    assert ours("  A_b, CAT!! ").tolist() == load_tokenizer(tmp_path, clean="none")("ab cat").tolist()
    # SiglipTokenizer itself needs sentencepiece; its canonicalize_text repairs nothing and keeps no underscore's place.
    assert CLEANERS["siglip"]("\tA_b, &amp; (CAT)!\n") == "ab amp cat"
    assert CLEANERS["canonicalize"]("\tA_b, &amp; (CAT)!\n") == "a b cat"


@pytest.mark.filterwarnings("ignore")  # another library's
def test_what_convert_writes_beside_a_tokenizer_serves_transformers(transformers, tmp_path):
    ours = train_tokenizer(["a big red cat", "a small blue dog"], 300, LENGTH)
    ours.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ours.settings()))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    cleaned = [CLEANERS["lower"](text) for text in TEXTS]
    expected = theirs(cleaned, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS), expected)
    again = load_tokenizer(tmp_path)
    assert (again.clean, again.context_length, again.pad_id) == ("lower", LENGTH, 0)
    assert torch.equal(again(TEXTS), ours(TEXTS))


@pytest.mark.filterwarnings("ignore")  # another library's
def test_openais_vocabulary_gives_open_clips_ids(open_clip):
    theirs = open_clip.tokenizer.SimpleTokenizer()
    ours = load_tokenizer(open_clip.tokenizer.default_bpe())
    assert (ours.vocab_size, ours.sot_id, ours.eot_id, ours.context_length) == (49408, 49406, 49407, 77)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is not a file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"names neither an eos_token nor a sep_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    with pytest.raises(DataError, match=r"has no tokenizer\.json, nor a whole vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    train_tokenizer(["a cat"], 300, LENGTH).save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"lacks the special tokens </s>"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"clean must be one of lower, whitespace, .*; got 'upper'"):
        load_tokenizer(tmp_path / "tokenizer.json", clean="upper")
