"""LLaVA's JSON read and written; what cannot be used is named; images as LLaVA makes them square."""

import io
import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from vlmfast.data.conversation import (
    Conversation,
    LlavaJson,
    Turn,
    check,
    load_vlm_image,
    put_images_first,
    read_llava,
    write_llava,
)
from vlmfast.data.skips import Skipped, UnreadableError
from vlmfast.errors import DataError

GREET = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Yes?"}]
LOOK = [
    {"from": "human", "value": "What is\n<image>"},
    {"from": "gpt", "value": "A cube é☃"},
    {"from": "human", "value": "And?"},
    {"from": "gpt", "value": "No."},
]
GOOD = [
    {"id": "000123", "image": "coco/a b.png", "conversations": LOOK},
    {"id": 7, "conversations": GREET},
    {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": [{"from": "human", "value": "<image> or <image>?"}, GREET[1]],
    },
    {"id": "told", "conversations": [{"from": "system", "value": "Be brief."}, *GREET]},
]


def turns(*pairs):
    return [{"from": who, "value": text} for who, text in pairs]


BAD = {  # reason -> record
    "record not an object": [1],
    "missing key": {"id": "bad", "image": "a.png"},
    "value not a text": {"id": "bad", "conversations": turns(("human", "Hello"), ("gpt", 3))},
    "unknown role": {"id": "bad", "conversations": turns(("human", "Hello"), ("robot", "Yes"))},
    "turns out of order": {"id": "bad", "conversations": turns(("human", "Hello"), ("human", "?"), ("gpt", "Yes"))},
    "empty question": {"id": "bad", "conversations": turns(("human", " "), ("gpt", "Yes"))},
    "empty answer": {"id": "bad", "conversations": turns(("human", "Hello"), ("gpt", " \n"))},
    "no assistant turn": {"id": "bad", "conversations": turns(("human", "Hello"))},
    "image mark outside a question": {
        "id": "bad",
        "image": "a.png",
        "conversations": turns(("human", "Hello"), ("gpt", "<image>")),
    },
    "number of image marks": {"id": "bad", "image": ["a.png"], "conversations": GREET},
    "answer before the first question": {"id": "bad", "conversations": [GREET[1], *GREET]},
}
MORE_BAD = [
    ("missing key", {"id": "bad", "conversations": {"from": "human"}}),
    ("missing key", {"id": "bad", "conversations": [{"from": "human"}]}),
    ("missing key", {"id": "bad", "conversations": ["Hello"]}),
    ("value not a text", {"id": "bad", "image": [None], "conversations": GREET}),
    ("value not a text", {"id": "bad", "image": "", "conversations": LOOK}),
    ("value not a text", {"id": "bad", "conversations": turns((None, "Hello"))}),
    ("text not UTF-8", {"id": "bad", "image": "\ud83d.png", "conversations": LOOK}),
    ("text not UTF-8", {"id": "bad", "image": "a\0.png", "conversations": LOOK}),
    ("text not UTF-8", {"id": "bad", "conversations": turns(("human", "Hello \ud83d"), ("gpt", "Yes"))}),
    ("turns out of order", {"id": "bad", "conversations": [*GREET, GREET[1]]}),
    ("turns out of order", {"id": "bad", "conversations": [*GREET, {"from": "system", "value": "Be brief."}]}),
    ("no assistant turn", {"id": "bad", "conversations": []}),
    ("number of image marks", {"id": "bad", "conversations": LOOK}),
    ("number of image marks", {"id": "bad", "image": ["a.png", "b.png"], "conversations": LOOK}),
]


def written(folder, records, name="data.json"):
    path = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_file_is_read_turn_for_turn(tmp_path, name):
    look, greet, two, told = read_llava(written(tmp_path, GOOD, name))
    assert look == Conversation(
        "000123",
        ("coco/a b.png",),
        (
            Turn("user", "What is\n<image>"),
            Turn("assistant", "A cube é☃"),
            Turn("user", "And?"),
            Turn("assistant", "No."),
        ),
    )
    assert (greet.id, greet.images) == ("7", ())
    assert two.images == ("a.png", "b.png")
    assert [turn.role for turn in told.turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", ["again.json", "again.jsonl"])
def test_what_is_written_is_read_again(tmp_path, name):
    conversations = read_llava(written(tmp_path, GOOD))
    write_llava(tmp_path / name, conversations)
    assert read_llava(tmp_path / name) == conversations
    records = [*map(json.loads, (tmp_path / name).read_text().splitlines())] if name.endswith("l") else GOOD
    assert [record["conversations"] for record in records] == [record["conversations"] for record in GOOD]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data.json", name])


def test_what_is_written_is_llavas_json(tmp_path):
    write_llava(tmp_path / "again.json", read_llava(written(tmp_path, GOOD)))
    again = json.loads((tmp_path / "again.json").read_text("utf-8"))
    assert again == [record | {"id": str(record["id"])} for record in GOOD]


@pytest.mark.parametrize(("reason", "record"), [*BAD.items(), *MORE_BAD])
def test_a_bad_record_is_named(tmp_path, reason, record):
    path = written(tmp_path, [GOOD[0], record])
    with pytest.raises(UnreadableError) as raised:
        read_llava(path)
    assert raised.value.reason == reason
    assert str(raised.value).startswith(f"{path}[1]")
    assert reason == "record not an object" or "sample 'bad'" in str(raised.value)


def test_a_bad_turn_is_told_by_its_number(tmp_path):
    record = {"id": "bad", "conversations": turns(("system", "Be brief."), ("human", "Hello"), ("gpt", ""))}
    with pytest.raises(UnreadableError, match=r"sample 'bad': empty answer \(turn 2\)"):
        read_llava(written(tmp_path, [record]))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_bad_records_are_counted_and_the_rest_read(tmp_path, name):
    skips = Skipped()
    found = read_llava(written(tmp_path, [GOOD[0], *BAD.values(), GOOD[1]], name), skips)
    early = "answer before the first question"  # the record is used without it
    assert [one.id for one in found] == ["000123", "bad", "7"]
    assert [turn.text for turn in found[1].turns] == ["Hello", "Yes?"]
    assert skips.counts() == dict.fromkeys(BAD, 1)
    assert early in skips.describe()


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD[0]) + "\n\n{'id': 1}\n" + json.dumps(GOOD[1]) + "\n")
    with pytest.raises(UnreadableError, match=r"data\.jsonl:3: record not JSON"):
        read_llava(path)
    skips = Skipped()
    assert len(read_llava(path, skips)) == 2
    assert skips.counts() == {"record not JSON": 1}


def test_a_file_that_is_of_no_use_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.json is not a file"):
        read_llava(tmp_path / "none.json")
    path = tmp_path / "data.json"
    path.write_text("[\n{},\n{]", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.json:3: not JSON"):
        read_llava(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not a file of UTF-8"):
        read_llava(path)
    path.write_text("")
    with pytest.raises(DataError, match="no conversation that can be used"):
        read_llava(path, Skipped())
    path.write_text("[{}]")
    with pytest.raises(DataError, match=r"no conversation that can be used.* skipped 1: 1 missing key"):
        read_llava(path, Skipped())


def test_a_record_without_an_id_is_called_by_its_place(tmp_path):
    unnamed = [{"conversations": GREET}, {"id": None, "conversations": GREET}]
    assert [each.id for each in read_llava(written(tmp_path, unnamed))] == ["data.json[0]", "data.json[1]"]


def test_nothing_bad_is_written(tmp_path):
    (conversation,) = read_llava(written(tmp_path, GOOD[:1]))
    with pytest.raises(UnreadableError, match="sample '000123': number of image marks"):
        write_llava(tmp_path / "again.json", [replace(conversation, images=())])
    assert not (tmp_path / "again.json").exists()


def test_a_role_of_ones_own_making_is_refused():
    talk = Conversation("1", (), (Turn("human", "Hello"), Turn("assistant", "Yes")))
    with pytest.raises(UnreadableError, match="sample '1': unknown role"):
        check(talk)


@pytest.mark.parametrize(
    ("question", "moved"),
    [
        ("What is\n<image>", "<image>\nWhat is"),
        (" <image> is what ", "<image>\nis what"),
        ("<image>", "<image>"),
        ("<image> or <image>?", "<image> or <image>?"),
        (" No picture ", " No picture "),
    ],
)
def test_the_image_of_a_question_goes_before_its_words(question, moved):
    images = ("a.png",) * question.count("<image>")
    talk = Conversation("1", images, (Turn("user", question), Turn("assistant", " Yes ")))
    assert put_images_first(talk).turns == (Turn("user", moved), Turn("assistant", " Yes "))


def png(height, width, shade=200):
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("height", "width"), [(3, 8), (8, 3), (5, 5)])
def test_padding_is_the_mean_colour_around_the_whole_image(height, width):
    image = load_vlm_image(png(height, width), (8, 8), mean=(0.1, 0.5, 0.9))
    if height == width:
        assert (image == 200).all()
        return
    top, left = (8 - height) // 2, (8 - width) // 2  # an odd remainder: the smaller half in front, as LLaVA pastes
    expected = torch.tensor([int(x * 255) for x in (0.1, 0.5, 0.9)], dtype=torch.uint8)[:, None, None].repeat(1, 8, 8)
    expected[:, top : top + height, left : left + width] = 200
    assert torch.equal(image, expected)


def test_padding_is_clips_mean_unless_said_otherwise():
    assert load_vlm_image(png(2, 8), (8, 8))[:, 0, 0].tolist() == [122, 116, 104]


def test_square_takes_the_middle_and_squash_all():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    assert (load_vlm_image(file.getvalue(), (4, 4), aspect="square") == 255).all()
    assert load_vlm_image(file.getvalue(), (4, 4), aspect="squash").float().mean() < 200


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_thread_of_an_image_is_refused(aspect):
    with pytest.raises(UnreadableError, match=r"thread\.png: too many pixels"):
        load_vlm_image(png(1, 60_000), (336, 336), aspect=aspect, where="thread.png")
    assert load_vlm_image(png(1, 1000), (336, 336), aspect=aspect).shape == (3, 336, 336)


@pytest.fixture
def data_set(tmp_path):
    (tmp_path / "coco").mkdir()
    for name in ("a.png", "b.png", "coco/a b.png"):
        (tmp_path / name).write_bytes(png(4, 6))
    (tmp_path / "broken.png").write_bytes(png(4, 6)[:50])
    records = [
        *GOOD,
        {"id": "lost", "image": "c.png", "conversations": LOOK},
        {"id": "broken", "image": "broken.png", "conversations": LOOK},
        BAD["no assistant turn"],
    ]
    return LlavaJson(written(tmp_path, records), tmp_path, (4, 4))


def test_samples_have_their_images(data_set):
    assert len(data_set) == 6
    assert [tuple(data_set[i].image.shape) for i in range(4)] == [(n, 3, 4, 4) for n in (1, 0, 2, 0)]
    assert all(data_set[i].image.dtype == torch.uint8 for i in range(4))
    assert data_set[0].conversation.turns[0].text == "<image>\nWhat is"
    assert "Be brief." in list(data_set.texts())


def test_unreadable_images_are_counted_with_sample_and_file(data_set):
    with pytest.raises(UnreadableError, match=r"c\.png of sample 'lost' in .*data\.json: missing image"):
        data_set[4]
    assert data_set.draw(4, 0, 0) is data_set.draw(5, 0, 0) is None
    assert data_set.skipped == {"missing image": 1, "corrupt image": 1, "no assistant turn": 1}
    assert "broken.png of sample 'broken'" in data_set.describe_skipped()


def test_what_the_reader_cannot_do_is_refused(data_set, tmp_path):
    for image_hw in ((4, 5), (0, 0)):
        with pytest.raises(ValueError, match="H = W >= 1"):
            LlavaJson(data_set.path, tmp_path, image_hw)
    with pytest.raises(ValueError, match="one of pad, square, squash"):
        LlavaJson(data_set.path, tmp_path, (4, 4), aspect="anyres")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        LlavaJson(data_set.path, tmp_path / "nowhere", (4, 4))
