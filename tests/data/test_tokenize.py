"""Byte-level BPE: nothing is unknown, every row ends in the highest id, and what is saved is what is loaded."""

import gzip
import json
import random

import ftfy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vlmfast.data.tokenize import END, PAD, START, Tokenizer, clean_text, load_tokenizer, train_tokenizer
from vlmfast.errors import DataError

CAPTIONS = [
    f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "blue") for shape in ("cat", "dog")
]
OURS = train_tokenizer(CAPTIONS, 300, 16)
LONG = train_tokenizer(CAPTIONS, 300, 2048)
RAW = train_tokenizer(CAPTIONS, 300, 2048, clean=False)


@given(st.text())
@example(f"{START} a cat {END} {PAD}")
@example("“ﬁne” &amp;amp; caf\u00e9 naïve 猫 😀\r\n\ttab")
def test_decoding_gives_back_the_cleaned_text(text):
    assert LONG.decode(LONG(text)[0]) == clean_text(text)
    assert RAW.decode(RAW(text)[0]) == text


@given(st.lists(st.text(), max_size=5))
@example([END, f"cat {END} dog", PAD, "", "a big red cat " * 9])
def test_every_row_is_start_tokens_end_zeros_and_its_end_is_its_maximum(texts):
    ids = OURS(texts)
    assert (ids.shape, ids.dtype) == ((len(texts), 16), torch.int64)
    for row in ids.tolist():
        end = row.index(OURS.eot_id)
        assert max(row) == OURS.eot_id == OURS.vocab_size - 1
        assert row.count(OURS.eot_id) == row.count(OURS.sot_id) == 1
        assert row[0] == OURS.sot_id
        assert set(row[end + 1 :]) <= {OURS.pad_id}
        assert 0 not in row[:end]
    assert ids.argmax(-1).tolist() == [row.index(OURS.eot_id) for row in ids.tolist()]


def test_one_text_is_a_batch_of_one_and_a_batch_is_its_rows():
    assert torch.equal(OURS(CAPTIONS), torch.cat([OURS(caption) for caption in CAPTIONS]))


def test_frequent_words_are_one_token():
    assert OURS("a big red cat")[0].tolist()[6:] == [0] * 10  # start, four words, end


def test_a_text_too_long_keeps_its_end_or_is_refused():
    text = "a" + " big red" * 18  # 37 words
    row = OURS(text)[0]
    assert row[-1] == OURS.eot_id
    assert torch.equal(row[:-1], LONG(text)[0, :15])
    with pytest.raises(
        ValueError, match=r"'a big red big red .*' needs 39 tokens with start and end; context_length is 16"
    ):
        OURS(["a", text], truncate=False)
    fits = "a" + " big red" * 6 + " cat"  # 14 words
    assert OURS(fits, truncate=False)[0, -1] == OURS.eot_id


def test_the_same_texts_in_any_order_train_the_same_tokenizer():
    shuffled = CAPTIONS * 3
    random.Random(0).shuffle(shuffled)
    assert train_tokenizer(shuffled, 300, 16) == train_tokenizer(iter(CAPTIONS * 3), 300, 16)
    assert train_tokenizer(CAPTIONS, 265, 16) != OURS


def test_the_vocabulary_is_no_larger_than_asked_nor_than_there_is_to_merge():
    assert train_tokenizer(CAPTIONS, 262, 16).vocab_size == 262
    assert train_tokenizer(CAPTIONS, 5000, 16).vocab_size == train_tokenizer(CAPTIONS, 9000, 16).vocab_size < 400
    assert train_tokenizer([], 300, 16).vocab_size == 259


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "run" / "tokenizer.json"
    OURS.save(path)
    loaded = load_tokenizer(path)
    assert loaded == OURS
    for name in ("vocab_size", "context_length", "pad_id", "sot_id", "eot_id", "clean"):
        assert getattr(loaded, name) == getattr(OURS, name)
    texts = [*CAPTIONS, f"a {END} b", "a big red cat " * 9]
    assert torch.equal(loaded(texts), OURS(texts))
    longer = load_tokenizer(path, 2048)
    assert torch.equal(longer(texts), LONG(texts))
    OURS.save(path)  # over itself
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]


def test_hugging_faces_names_of_start_and_end_are_known(tmp_path):
    path = tmp_path / "tokenizer.json"
    OURS.save(path)
    path.write_text(path.read_text().replace(START, "<|startoftext|>").replace(END, "<|endoftext|>"))
    assert torch.equal(load_tokenizer(path)(CAPTIONS), OURS(CAPTIONS))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    OURS.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        LONG.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    OURS.save(path)
    whole = path.read_text()
    path.write_text(whole[:1000])
    with pytest.raises(DataError, match=r"tokenizer\.json is not a whole tokenizer\.json"):
        load_tokenizer(path)
    path.write_text(whole.replace(END, "<other>"))
    with pytest.raises(DataError, match="none of the pairs of start and end tokens"):
        load_tokenizer(path)
    path.write_text(whole.replace(START, "<x>").replace(END, START).replace("<x>", END))
    with pytest.raises(DataError, match=r"end token '<end_of_text>' must have the highest id.* it has \d+ of \d+ ids"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"absent\.json is not a file"):
        load_tokenizer(tmp_path / "absent.json")


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 .* got 258"):
        train_tokenizer(CAPTIONS, 258, 16)
    with pytest.raises(ValueError, match="context_length must be at least 2, for start and end; got 1"):
        train_tokenizer(CAPTIONS, 300, 1)


def test_the_file_alone_serves_another_library(tmp_path):
    import tokenizers

    OURS.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.encode("a big red cat").ids == OURS("a big red cat")[0].tolist()
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 16


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\tBig \n Cat ", "a big cat"),
        ("l&#39;&amp;amp;été", "l'&été"),
        ("schÃ¶n", "schön"),
        ("“quoted” ﬁne", '"quoted" fine'),
        ("cats &amp; dogs", "cats & dogs"),
        ("\x1b[1mcat\x1b[0m", "cat"),
        ("", ""),
    ],
)
def test_cleaning_is_open_clips(text, cleaned):
    assert clean_text(text) == cleaned


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_ftfy_leaves_plain_ascii_as_it_is(text):
    assert ftfy.fix_text(text) == text  # why `clean_text` may skip it there


# OpenAI's file


def openai_file(folder, merges=("c a", "ca t</w>", "r e", "re d</w>")):
    path = folder / "bpe.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges, ""]).encode()))
    return path


def test_a_list_of_merges_gives_openais_ids(tmp_path):
    tokenizer = load_tokenizer(openai_file(tmp_path))
    letters, ends = (lambda c: ord(c) - 33), (lambda c: 256 + ord(c) - 33)  # 256 bytes, then 256 that end a word
    cat, red = 512 + 1, 512 + 3
    assert (tokenizer.vocab_size, tokenizer.context_length, tokenizer.eot_id) == (512 + 4 + 2, 77, 512 + 5)
    text = "Cat's red! redcat 42"
    expected = [cat, letters("'"), ends("s"), red, ends("!")]
    expected += [512 + 2, letters("d"), cat, ends("4"), ends("2")]  # "re" "d" "cat</w>"; figures are words of their own
    assert tokenizer(text)[0].tolist() == [512 + 4, *expected, 512 + 5] + [0] * (77 - 2 - len(expected))
    # "~" is letter 93, "\xc3" 127, "\xa9" 102; of "\xe7\x8c\xab" the middle byte has no letter of its own.
    assert tokenizer("~ é 猫")[0, 1:7].tolist() == [256 + 93, 127, 256 + 102, 163, 188 + 46, 256 + 104]
    assert tokenizer.decode(tokenizer(text)[0]) == "cat 's red ! redcat 4 2"


def test_a_damaged_list_of_merges_is_refused(tmp_path):
    path = openai_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="is not a whole list of BPE merges"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="is not a whole list of BPE merges"):
        load_tokenizer(openai_file(tmp_path, ["zz qq"]))


def test_tokenizers_compare_by_what_they_do():
    assert OURS != "a tokenizer"
    assert Tokenizer(OURS._inner, 16, clean=False) != OURS
