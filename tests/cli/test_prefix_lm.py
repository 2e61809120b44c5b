"""A prefix-LM asked a second question: it reads the conversation as it was trained to, in files and in a chat."""

from dataclasses import replace

import pytest
import torch
from small_vlm import write_vlm

from vlmfast.data.conversation import Turn
from vlmfast.data.dialogue import supervise
from vlmfast.data.scenes import tasks
from vlmfast.recipes.chat import Chat
from vlmfast.recipes.vlm_data import Items
from vlmfast.recipes.vlm_predict import VlmFlags, answers, likelihoods, open_talker

FLAGS = VlmFlags(max_new_tokens=6, batch_size=4)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = write_vlm(tmp_path_factory.mktemp("vlm") / "run", prefix_lm=True)
    return open_talker(VlmFlags(model=folder, device="cpu"))


@pytest.fixture(scope="module")
def items():
    """Second and third questions about an image, with those before and their answers."""
    every = Items(tasks.dataset("L1", "test", "vqa", 3, questions_per_image=3))
    return [item for item in every.read(range(9)) if len(item.conversation.turns) > 1]


def trained(talker, item, ids):
    """[T] losses of ids as the words of an answer, in a batch as training packs it: earlier answers are supervised."""
    told = replace(item.conversation, turns=item.conversation.turns[:-1])
    labels, start = torch.full_like(ids, -100), len(talker.prompt(item.conversation))
    before = supervise(told, "bare", talker.tokenizer, 16).labels
    labels[: len(before)], labels[start:] = before, ids[start:]
    prefix = (labels != -100).int().argmax()[None]
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        losses = talker.model(ids, item.image, labels, ends, prefix=prefix, reduction="none")
    return losses[start:]


def test_likelihoods_of_later_answers_are_those_of_the_training_loss(talker, items):
    ranked = [item for item in items if item.candidates]
    assert ranked
    for item, probs in zip(ranked, likelihoods(talker, ranked), strict=True):
        nlls = []
        for candidate in item.candidates:
            turns = (*item.conversation.turns, Turn("assistant", candidate))
            told = supervise(replace(item.conversation, turns=turns), "bare", talker.tokenizer, 16)
            nlls.append(trained(talker, item, told.ids).sum())
        exact = torch.stack(nlls).neg().double().softmax(0)
        torch.testing.assert_close(torch.tensor(list(probs.values())).double(), exact, rtol=1e-3, atol=1e-5)


def test_later_answers_are_written_as_the_training_loss_reads_them(talker, items):
    for item, answer in zip(items, answers(talker, items, FLAGS), strict=True):
        ids = torch.cat([talker.prompt(item.conversation), answer.tokens])
        expected = -trained(talker, item, ids)
        torch.testing.assert_close(answer.log_probs[: len(answer.tokens)], expected, rtol=1e-3, atol=1e-4)


def test_the_prefix_is_what_training_takes(talker):
    conversation = tasks.dataset("L1", "test", "vqa", 1, questions_per_image=3)[0].conversation
    labels = supervise(conversation, "bare", talker.tokenizer, 16).labels
    assert talker.prefix(conversation) == int((labels != -100).int().argmax())


def test_a_chat_keeps_what_it_computed(talker):
    chat = Chat(talker, FLAGS, lambda piece: None)
    chat.take("What is it?")
    chat.take("How many?")
    assert chat.session.tokens_reused > 0
