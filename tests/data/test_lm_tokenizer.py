"""Texts to tokens and back, each token's characters, and the folders of other people's models."""

import json

import pytest
import torch
from lm_vocabularies import NAMES, VOCABULARIES, byte_level, corpus, sentencepiece, vocabulary
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from vlmfast.data.lm_tokenizer import LmTokenizer, load_lm_tokenizer, train_lm_tokenizer
from vlmfast.errors import DataError

TEXTS = ["a red cube", "  left  of \n é ☃ 漢字 🙂 ", "USER: 42 things, 1999?</s>yes", "\n", "👩‍👩‍👧 zalgo z̷̢"]


def saved(folder, inner, **config):
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return folder


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_decoding_gives_the_text_again(name, text):
    tokenizer = vocabulary(name)
    if name in ("Llama 2", "Unigram") and "</s>" in text:
        return  # SentencePiece puts a space of its own behind a special token
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special=False) == text


@pytest.mark.parametrize("text", [*TEXTS, ""])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_offsets_are_the_characters_of_the_text(name, text):
    tokenizer = vocabulary(name)
    ids, offsets = tokenizer.encode(text)
    assert len(ids) == len(offsets)
    assert offsets == sorted(offsets, key=lambda offset: offset[0])
    assert all(start < end <= len(text) for start, end in offsets)
    assert {place for start, end in offsets for place in range(start, end)} == set(range(len(text)))  # none is lost
    for id, (start, end) in zip(ids, offsets, strict=True):
        spelt = tokenizer.decode([id], skip_special=False)
        if "\ufffd" not in spelt:  # else it is one byte of several
            assert spelt.strip(" ") in text[start:end]
    if "</s>" in text:
        assert offsets[ids.index(tokenizer.eos_id)] == (text.index("</s>"), text.index("</s>") + 4)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_stream_gives_the_text_in_whole_characters(name, text):
    tokenizer = vocabulary(name)
    ids = tokenizer.encode(text).ids
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_a_stream_ends_with_what_is_unfinished():
    tokenizer = vocabulary("byte-level BPE")
    ids = tokenizer.encode("red 🙂").ids[:-1]
    stream = tokenizer.stream()
    told = "".join(map(stream.push, ids))
    assert told.rstrip() == "red"
    assert told + stream.finish() == tokenizer.decode(ids)
    assert stream.push(tokenizer.encode(" cube").ids[0]) == " cube"  # goes on behind it


def test_training_again_gives_the_same_vocabulary():
    one, other = train_lm_tokenizer(corpus(), 400), train_lm_tokenizer(corpus()[::-1], 400)
    assert one.encode(TEXTS[0]) == other.encode(TEXTS[0])
    assert one.vocab_size == other.vocab_size <= 400
    assert (one.pad_id, one.bos_id, one.eos_id, one.image_token_id) == (0, 1, 2, 3)
    assert one.added == ()
    assert one.decode(torch.tensor(one.encode("été ☃").ids)) == "été ☃"
    with_marks = train_lm_tokenizer(corpus(), 400, special=["<|im_start|>"])
    assert with_marks.token_id("<|im_start|>") == 4
    assert "<|im_start|>" in with_marks.special
    with pytest.raises(ValueError, match="at least 260"):
        train_lm_tokenizer(corpus(), 259)


@pytest.mark.parametrize(
    "make", [lambda: train_lm_tokenizer(corpus(), 400), *map(lambda n: lambda: vocabulary(n), VOCABULARIES)]
)
def test_a_saved_tokenizer_is_the_same(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    again = load_lm_tokenizer(tmp_path)
    names = ("bos", "eos", "bos_id", "eos_id", "pad_id", "image_token_id", "vocab_size", "special")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
    assert again.added == ()
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a red <image>cube").input_ids == [tokenizer.bos_id, *tokenizer.encode("a red <image>cube").ids]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


S, E = ({"__type": "AddedToken", "content": token, "special": True} for token in ("<s>", "</s>"))
FOLDERS = {  # what the folders of these families say, and the token that their texts begin with
    "Llama": (sentencepiece, {"bos_token": S, "eos_token": E, "add_bos_token": True, "legacy": False}, "<s>"),
    "Llama 3": (byte_level, {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "GPT-2": (lambda: byte_level(bos=False), {"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": True}, None),
    "Qwen2": (
        lambda: byte_level(bos=False),
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        None,
    ),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_says_how_texts_begin_and_end(family, tmp_path):
    make, config, bos = FOLDERS[family]
    tokenizer = load_lm_tokenizer(saved(tmp_path, make(), **config))
    end = config["eos_token"]
    end = end["content"] if isinstance(end, dict) else end
    assert tokenizer.bos == bos
    assert tokenizer.eos == end
    assert tokenizer.bos_id == (None if bos is None else tokenizer.token_id(bos))
    assert tokenizer.eos_id == tokenizer.token_id(end)
    assert tokenizer.pad_id == tokenizer.token_id("<pad>" if config.get("pad_token") else end)
    assert tokenizer.added == ("<image>",)
    assert tokenizer.image_token_id == tokenizer.vocab_size - 1
    ids = tokenizer.encode("a red cube").ids
    assert ids[0] != tokenizer.bos_id
    whole = ids if bos is None else [tokenizer.bos_id, *ids]
    assert AutoTokenizer.from_pretrained(tmp_path)("a red cube").input_ids == whole  # transformers' reading of the same
    tokenizer.save(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("a red cube").input_ids == whole
    assert theirs("<image>").input_ids[-1] == tokenizer.image_token_id


def test_an_image_token_of_the_folder_is_kept(tmp_path):
    inner = sentencepiece()
    inner.add_special_tokens(["<image>", "<more>"])
    tokenizer = load_lm_tokenizer(saved(tmp_path, inner, **NAMES))
    assert tokenizer.added == ()
    assert tokenizer.image_token_id == inner.token_to_id("<image>") == tokenizer.vocab_size - 2


def test_added_tokens_of_the_folder_are_put_in(tmp_path):
    inner = byte_level()
    first = inner.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<second>": first + 1, "<first>": first}))
    decoder = {str(first + 2): {"content": "<image>", "special": True}}
    tokenizer = load_lm_tokenizer(saved(tmp_path, inner, **NAMES, added_tokens_decoder=decoder))
    assert [tokenizer.token_id(name) for name in ("<first>", "<second>", "<image>")] == [first, first + 1, first + 2]
    assert tokenizer.added == ()
    saved(tmp_path, inner, **NAMES)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<first>": first + 9}))
    with pytest.raises(DataError, match=f"'<first>' the id {first + 9}; in tokenizer.json it is {first}"):
        load_lm_tokenizer(tmp_path)


def test_special_tokens_may_stand_in_their_own_file(tmp_path):
    saved(tmp_path, sentencepiece())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(NAMES))
    assert load_lm_tokenizer(tmp_path).eos == "</s>"


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is not a file.*save_pretrained"):
        load_lm_tokenizer(tmp_path)
    saved(tmp_path, sentencepiece())
    with pytest.raises(DataError, match="no eos_token is named"):
        load_lm_tokenizer(tmp_path)
    saved(tmp_path, sentencepiece(), eos_token="<|end|>")
    with pytest.raises(DataError, match=r"'<\|end\|>' is not in the vocabulary"):
        load_lm_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_lm_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json must hold an object; got \[\]"):
        load_lm_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a whole tokenizer\.json"):
        load_lm_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "model",
    [models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"), models.Unigram([("</s>", 0.0), ("a", -1.0)])],
)
def test_a_text_that_the_vocabulary_cannot_spell_is_refused(model):
    tokenizer = LmTokenizer(Tokenizer(model), {"eos_token": "</s>"})
    with pytest.raises(DataError, match="the text 'b' cannot be spelt in this vocabulary"):
        tokenizer.encode("b")
    other = Tokenizer(models.WordLevel({"</s>": 0, "b": 1}, unk_token="<unk>"))
    with pytest.raises(DataError, match="the text 'a' cannot be spelt in this vocabulary"):
        LmTokenizer(other, {"eos_token": "</s>"})


def test_padding_and_truncation_of_the_file_are_left_out(tmp_path):
    inner = byte_level()
    inner.enable_padding(length=16)
    inner.enable_truncation(4)
    tokenizer = load_lm_tokenizer(saved(tmp_path, inner, **NAMES))
    assert tokenizer.encode("a red cube left of a blue ball") == LmTokenizer(byte_level(), dict(NAMES)).encode(
        "a red cube left of a blue ball"
    )
