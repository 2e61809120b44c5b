"""`vlmfast chat`: what each turn is shown, what is kept between turns, and commands, through a pipe."""

import io
from dataclasses import replace

import PIL.Image
import pytest
import torch
from small_vlm import write_vlm

from vlmfast.data.conversation import Conversation, Turn
from vlmfast.data.scenes import tasks
from vlmfast.errors import DataError
from vlmfast.recipes.chat import Chat, _EndedError, _Spoken
from vlmfast.recipes.vlm_predict import VlmFlags, generation_options, open_talker

FLAGS = VlmFlags(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vlm(tmp_path_factory.mktemp("vlm") / "run", template="v1")


@pytest.fixture(scope="module")
def talker(folder):
    return open_talker(VlmFlags(model=folder, device="cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("pictures") / f"{i}.png" for i in range(2)]
    for path, sample in zip(paths, tasks.dataset("L1", "test", "caption", 2).__getitems__([0, 1]), strict=True):
        PIL.Image.fromarray(sample.image[0].permute(1, 2, 0).numpy()).save(path)
    return paths


def fresh(talker, turns, paths):
    """The answer of a model that remembers nothing to the whole conversation."""
    conversation = Conversation("c", tuple(map(str, paths)), tuple(turns))
    images = torch.stack([talker.image(path) for path in paths])
    options = generation_options(talker, FLAGS)
    return talker.text(talker.model.generate([talker.prompt(conversation)], [images], **options)[0].tokens)


def test_every_turn_is_answered_with_all_that_was_said_before(talker, pictures):
    pieces = []
    chat = Chat(talker, FLAGS, pieces.append)
    chat.show(pictures[0])
    assert chat.take("What is it?\n")
    turns = [Turn("user", "<image>\nWhat is it?")]
    first = chat.turns[-1].text
    assert first == fresh(talker, turns, pictures[:1])
    assert "".join(pieces) == first + "\n"
    assert chat.session.tokens_reused == 0

    assert chat.take("How many?")
    turns += [Turn("assistant", first), Turn("user", "How many?")]
    assert chat.turns[-1].text == fresh(talker, turns, pictures[:1])
    assert chat.session.tokens_reused > talker.model.image_tokens, "the first turn's keys and values are kept"

    chat.take(f"/image {pictures[1]}")
    chat.take("And this?")
    turns += [chat.turns[3], Turn("user", "<image>\nAnd this?")]
    assert chat.turns[-1].text == fresh(talker, turns, pictures)

    chat.take("/reset")
    assert chat.turns == []
    chat.show(pictures[0])
    chat.take("What is it?")
    assert chat.turns[-1].text == first


def test_a_pipe_is_answered_line_by_line(vlmfast, monkeypatch, folder, talker, pictures):
    said = f"What is it?\n\n/image {pictures[1]}\nAnd this?\n/quit\nNever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    words = ["--model", folder, "--image", pictures[0], "--max-new-tokens", "6", "--device", "cpu"]
    shown = vlmfast("chat", *words)
    chat = Chat(talker, FLAGS, lambda text: None)
    chat.show(pictures[0])
    expected = chat.ask("What is it?")
    chat.show(pictures[1])
    assert shown.out == f"{expected}\n{chat.ask('And this?')}\n"


def test_the_system_sentence_can_be_replaced(talker, pictures):
    chat = Chat(talker, FLAGS, lambda text: None, system="Be short.")
    chat.ask("Hello")
    turns = [Turn("system", "Be short."), Turn("user", "Hello")]
    assert chat.turns[:2] == turns
    chat.reset()
    assert chat.turns == turns[:1]


def test_the_end_mark_is_never_shown(talker):
    pieces = []
    spoken = _Spoken(replace(talker, template="v0"), pieces.append)

    def speak(text):
        for token in talker.tokenizer.encode(text).ids:
            spoken.push(0, token)

    speak(" two # more ")
    assert "two # more".startswith("".join(pieces))
    assert len(pieces) > 2
    with pytest.raises(_EndedError):
        speak("### Human")
    assert spoken.finish() == "two # more"
    assert "".join(pieces) == "two # more\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [("/jump", "unknown command /jump: /image PATH"), ("/image none.png", "none.png: there is no such image")],
)
def test_refusals(talker, refused, monkeypatch, folder, line, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        Chat(talker, FLAGS, lambda text: None).take(line)
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    assert message in refused("chat", "--model", folder, "--device", "cpu")


def test_a_question_that_does_not_fit_is_not_remembered(talker):
    chat = Chat(talker, FLAGS, lambda text: None)
    with pytest.raises(DataError, match="prompt longer than the context"):
        chat.ask("why " * 300)
    assert chat.turns == []
