"""Each template's text is the one that LLaVA's conversation templates give, and a prompt is where an answer begins."""

import pytest

from vlmfast.data.conversation import Conversation, Turn
from vlmfast.data.templates import TEMPLATES

TALK = Conversation(
    "talk",
    ("a.png",),
    (
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "A cube."),
        Turn("user", "Which colour?"),
        Turn("assistant", "Red."),
    ),
)

# Written down from the templates of LLaVA's repository (conversation.py, commit c121f04) and its get_prompt.
TEXTS = {
    "v0": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.###Human: <image>\nWhat is it?###Assistant: A cube.###"
        "Human: Which colour?###Assistant: Red.###"
    ),
    "v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cube.</s>"
        "USER: Which colour? ASSISTANT: Red.</s>"
    ),
    "bare": "USER: <image>\nWhat is it? ASSISTANT: A cube.</s>USER: Which colour? ASSISTANT: Red.</s>",
    "llama_2": (
        "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
        "<</SYS>>\n\n<image>\nWhat is it? [/INST] A cube. </s><s>[INST] Which colour? [/INST] Red. </s>"
    ),
    "mistral": "[INST] <image>\nWhat is it? [/INST] A cube. </s>[INST] Which colour? [/INST] Red. </s>",
    "mpt": (
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful "
        "and honest answers.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\nA cube."
        "<|im_end|><|im_start|>user\nWhich colour?<|im_end|><|im_start|>assistant\nRed.<|im_end|>"
    ),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\nA cube.<|im_end|><|im_start|>user\nWhich colour?<|im_end|><|im_start|>assistant\nRed."
        "<|im_end|>"
    ),
}
WRITTEN = {  # what a model learns to write
    "v0": [" A cube.###", " Red.###"],
    "v1": [" A cube.</s>", " Red.</s>"],
    "bare": [" A cube.</s>", " Red.</s>"],
    "llama_2": [" A cube. </s>", " Red. </s>"],
    "mistral": [" A cube. </s>", " Red. </s>"],
    "mpt": ["A cube.<|im_end|>", "Red.<|im_end|>"],
    "chatml": ["A cube.<|im_end|>", "Red.<|im_end|>"],
}


def cut(conversation, turns):
    return Conversation(conversation.id, conversation.images, conversation.turns[:turns])


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_llavas(name):
    text, spans = TEMPLATES[name].render(TALK)
    assert text == TEXTS[name]
    assert [text[start:end] for start, end in spans] == WRITTEN[name]


def test_plain_keeps_the_image_and_the_caption():
    text, spans = TEMPLATES["plain"].render(cut(TALK, 2))
    assert text == "<image>A cube.\n"
    assert [text[start:end] for start, end in spans] == ["A cube.\n"]


def test_every_template_is_tested():
    assert {*TEXTS, "plain"} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_prompt_ends_where_the_answer_begins(name, turns):
    if name == "plain" and turns == 3:
        return
    prompt, spans = TEMPLATES[name].render(cut(TALK, turns))
    whole, of_whole = TEMPLATES[name].render(cut(TALK, turns + 1))
    assert prompt == whole[: of_whole[-1][0]]
    assert spans == of_whole[:-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_turn_takes_the_place_of_the_sentence(name):
    talk = Conversation("talk", TALK.images, (Turn("system", "Be brief."), *TALK.turns[:2]))
    text = TEMPLATES[name].render(talk).text
    assert ("Be brief." in text) == (name != "plain")  # plain has captions only
    assert TEMPLATES[name].system == "" or TEMPLATES[name].system not in text


def test_the_ends_of_texts_are_the_tokenizers():
    text, spans = TEMPLATES["llama_2"].render(TALK, bos="[B]", eos="[E]")
    assert "</s>" not in text
    assert "<s>" not in text
    assert "A cube. [E][B][INST] Which" in text
    assert text.endswith("Red. [E]")
    assert [text[start:end] for start, end in spans] == [" A cube. [E]", " Red. [E]"]
