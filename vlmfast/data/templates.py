"""How a conversation becomes one text, and which characters of it a model learns to write.

The texts are those of LLaVA's conversation templates (Liu et al. 2023), their end-of-text token being the tokenizer's
own. What a model learns is each answer, with the space before it and the end mark behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vlmfast.data.conversation import IMAGE_MARK, Conversation

BOS, EOS = "{bos}", "{eos}"  # in a template: the tokenizer's beginning and end of a text

CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
LLM_BASED = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


class Rendered(NamedTuple):
    """A conversation as one text."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters [start, end) that a model learns to write: lead, answer, end


@dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    A round is `user[0]`, the question, `user[1]`, `answer`, then `lead`, the answer, `end`. A prompt stops behind
    `answer`, so that all the rest is the model's to write, with `lead`: a space, which most vocabularies join to the
    word behind it.
    """

    name: str
    system: str  # the sentence of a conversation that has no system turn of its own
    around_system: tuple[str, str]
    user: tuple[str, str]
    answer: str
    lead: str
    end: str
    between: str = ""  # two rounds
    system_in_user: bool = False  # the system text stands in the first question
    marks_only: bool = False  # of the question only the image marks are kept, of the system text nothing

    def render(self, conversation: Conversation, *, bos: str = "<s>", eos: str = "</s>") -> Rendered:
        """The text of a conversation; one that ends with a question ends where the answer has to begin.

        Args:
            conversation: turns that `check` has passed.
            bos: the tokenizer's beginning-of-text token, or "". It is not put at the front of the text.
            eos: the tokenizer's end-of-text token.

        Returns:
            A Rendered.
        """
        turns, system = list(conversation.turns), self.system
        if turns[0].role == "system":
            system = turns.pop(0).text
        system = "" if not system or self.marks_only else system.join(self.around_system)
        end, text, spans = self.end.replace(EOS, eos), "", []
        for place, turn in enumerate(turns):
            if turn.role == "assistant":
                written = self.lead + turn.text + end
                spans.append((len(text), len(text) + len(written)))
                text += written
                continue
            question = IMAGE_MARK * turn.text.count(IMAGE_MARK) if self.marks_only else turn.text
            if place:
                text += self.between.replace(BOS, bos)
            elif self.system_in_user:
                question = system + question
            else:
                text += system
            text += self.user[0] + question + self.user[1] + self.answer
        return Rendered(text, tuple(spans))


_V1 = Template("v1", CURIOUS_USER, ("", " "), ("USER: ", " "), "ASSISTANT:", " ", EOS)
_INST = ("[INST] ", " [/INST]")
_IM_SYSTEM, _IM_USER = ("<|im_start|>system\n", "<|im_end|>"), ("<|im_start|>user\n", "<|im_end|>")
_IM_ANSWER = "<|im_start|>assistant\n"

# Name -> template. `bare` is v1 without the sentence; the others have LLaVA's names, with `llama_2` its
# `llava_llama_2`, `chatml` its `chatml_direct` and `mistral` its `mistral_instruct`.
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("plain", "", ("", ""), ("", ""), "", "", "\n", marks_only=True),
        Template("v0", CURIOUS_HUMAN, ("", "###"), ("Human: ", "###"), "Assistant:", " ", "###"),
        _V1,
        Template("bare", "", *(_V1.around_system, _V1.user, _V1.answer, _V1.lead, _V1.end)),
        Template(
            "llama_2",
            LANGUAGE_AND_VISION,
            ("<<SYS>>\n", "\n<</SYS>>\n\n"),
            _INST,
            "",
            " ",
            " " + EOS,
            between=BOS,
            system_in_user=True,
        ),
        Template("mistral", "", ("<<SYS>>\n", "\n<</SYS>>\n\n"), _INST, "", " ", " " + EOS, system_in_user=True),
        Template("mpt", LLM_BASED, _IM_SYSTEM, _IM_USER, _IM_ANSWER, "", "<|im_end|>"),
        Template("chatml", "Answer the questions.", _IM_SYSTEM, _IM_USER, _IM_ANSWER, "", "<|im_end|>"),
    )
}
