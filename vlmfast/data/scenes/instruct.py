"""Instruction data from scenes: LLaVA's three kinds, every answer checked by running its programs on the scene.

A conversation answers several questions in sentences, a detailed description tells all, and reasoning names what it
rests on before it concludes. LLaVA had a language model write them from captions and boxes (Liu et al. 2023, section
3); here they follow from the same facts by rules, so that what an answer states is a list of programs and answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmfast.data.scenes.captions import CONVERSE, NUMBERS, Claim, Mention, caption, claims, in_reading_order
from vlmfast.data.scenes.latents import Field, Scene
from vlmfast.data.scenes.programs import Program, execute
from vlmfast.data.scenes.questions import Draw, Question, a_noun, in_words, key, noun, questions
from vlmfast.errors import DataError

KINDS = {"conversation": 58, "detail": 23, "reasoning": 77}  # thousands of each in LLaVA-Instruct-158K
DETAIL = (
    "Give a detailed description of the image.",
    "What can be seen in the image, and where is it?",
    "Tell me everything that the image shows.",
    "Describe all things in the image and how they lie to each other.",
)
REASONED = ("compare", "same", "logic", "two-hop", "count")  # families with something to explain
TURNS = (3, 5)  # the least and the greatest number of turns of a conversation, as far as the scene has questions

Check = tuple[Program, str]  # a program, and what it must answer


@dataclass(frozen=True)
class Instruction:
    """What a user asks, what is answered, and the checks that the answer's statements come to."""

    kind: str
    question: str
    answer: str
    checks: tuple[Check, ...]


def instruct(scene: Scene) -> list[Instruction]:
    """The turns about a scene: of a conversation, a detailed description, or reasoning, as the scene's number has it.

    Args:
        scene: of L1 or a higher level.

    Raises:
        DataError: the level has no questions, or an answer does not hold in the scene.
    """
    draw = Draw(*key(scene.seed, scene.level, scene.split)[:3], Field.INSTRUCT, scene.index)
    kind = draw.one([name for name, share in KINDS.items() for _ in range(share)])
    if kind == "detail":
        turns = [_detail(scene, draw)]
    elif kind == "conversation":
        asked = list(draw.shuffled(questions(scene)))[: TURNS[0] + draw.below(TURNS[1] - TURNS[0] + 1)]
        turns = [Instruction(kind, each.text, *conclusion(each)) for each in asked]
        turns[0] = replace(turns[0], question=f"Answer in sentences. {turns[0].question}")
    else:
        asked = [each for each in questions(scene) if each.family in REASONED]
        turns = [_reasoning(scene, draw.one(asked))]
    for turn in turns:
        for program, answer in turn.checks:
            if execute(program, scene) != answer:
                where = f"scene {scene.index} of {scene.level}/{scene.split}"
                raise DataError(f"scenes: {turn.answer!r} does not hold in {where}: {program} is not {answer}")
    return turns


def conclusion(question: Question) -> tuple[str, tuple[Check, ...]]:
    """The answer to a question as a sentence, and what it states.

    Args:
        question: of any family.
    """
    program, yes = question.program, question.answer == "yes"
    own = ((program, question.answer),)
    word = "Yes" if yes else "No"
    match program:
        case ["exist", some]:
            return (f"Yes, there is {a_noun(_said(some))}." if yes else f"No, there is no {noun(_said(some))}."), own
        case ["count", some]:
            return _counted(some, question.answer), own
        case ["query", kind, one]:
            return _valued(kind, one, question.answer), own
        case ["bigger" | "smaller" | "more" | "fewer" as which, a, b]:
            true = which if yes else _OPPOSITE[which]
            if which in ("bigger", "smaller"):
                text = f"{word}, {_the(a)} is {true} than {_the(b)}."
            else:
                text = f"{word}, there are {true} {noun(_said(a), many=True)} than {noun(_said(b), many=True)}."
            return text, (*own, ((true, a, b), "yes"))
        case ["relates", relation, a, b]:
            true = relation if yes else CONVERSE[relation]
            return f"{word}, {_the(a)} is {in_words(true)} {_the(b)}.", (*own, (("relates", true, a, b), "yes"))
        case ["same" | "different" as which, kind, a, b]:
            alike = (which == "same") == yes
            text = f"{word}, they have the same {kind}." if alike else f"{word}, their {kind}s differ."
            return text, (*own, (("same" if alike else "different", kind, a, b), "yes"))
        case ["not", ["exist", some]]:
            return (f"Yes, there is no {noun(_said(some))}." if yes else f"No, there is {a_noun(_said(some))}."), own
        case ["and", *_]:
            return ("Yes, there are both." if yes else "No, there are not both."), own
        case _:
            return ("Yes, there is at least one of them." if yes else "No, there is neither."), own


_OPPOSITE = {"bigger": "smaller", "smaller": "bigger", "more": "fewer", "fewer": "more"}


def _detail(scene: Scene, draw: Draw) -> Instruction:
    checks = tuple(_claimed(claim) for claim in claims(in_reading_order(scene), "paragraph"))
    return Instruction("detail", draw.one(DETAIL), caption(scene, "paragraph", 0, "reading"), checks)


def _claimed(claim: Claim) -> Check:
    """What a claim of a caption comes to."""
    if claim.mention is None:
        return ("count", ("all",)), str(claim.count)
    if claim.relation and claim.other:
        return ("relates", claim.relation, _mentioned(claim.mention), _mentioned(claim.other)), "yes"
    some = _mentioned(claim.mention)
    return ("exist", ("filter", "place", claim.place, some) if claim.place else some), "yes"


def _mentioned(mention: Mention) -> Program:
    return _all({name: value for name, value in vars(mention).items() if value})


def _reasoning(scene: Scene, question: Question) -> Instruction:
    """The question, answered by what it rests on and the conclusion."""
    steps = _evidence(scene, question.program)
    end, checks = conclusion(question)
    answer = " ".join([*(text for text, _ in steps), f"So the answer is: {end[0].lower()}{end[1:]}"])
    every = (*(check for _, some in steps for check in some), *checks)
    return Instruction("reasoning", f"{question.text} Explain your answer.", answer, every)


def _evidence(scene: Scene, program: Program) -> list[tuple[str, tuple[Check, ...]]]:
    """Sentences from which the program's answer follows, each with what it states."""

    def value(kind: str, one: Program) -> tuple[str, tuple[Check, ...]]:
        answer = execute(("query", kind, one), scene)
        return _valued(kind, one, answer), ((("query", kind, one), answer),)

    match program:
        case ["bigger" | "smaller", a, b]:
            return [value("size", a), value("size", b)]
        case ["same" | "different", kind, a, b]:
            return [value(kind, a), value(kind, b)]
        case ["more" | "fewer", *sets]:
            counts = [(some, execute(("count", some), scene)) for some in sets]
            return [(_counted(some, count), ((("count", some), count),)) for some, count in counts]
        case ["and" | "or" | "not", *parts]:
            found = [(some, execute(("exist", some), scene)) for _, some in parts]
            return [
                (f"There is {a_noun(_said(some))}." if here == "yes" else f"There is no {noun(_said(some))}.",
                 ((("exist", some), here),))
                for some, here in found
            ]  # fmt: skip
        case ["query", _, one]:  # of something beside an anchor
            relation, anchor = _beside(one)
            kinds = ("size", *(("texture",) if scene.objects[0].texture else ()), "colour", "shape")
            values = {kind: execute(("query", kind, one), scene) for kind in kinds}
            checks = tuple((("query", kind, one), answer) for kind, answer in values.items())
            where = f"{in_words(relation)} it".capitalize()
            only = "the only thing is" if one[0] == "beside" else f"the only {noun(_said(one))} is"
            return [value("place", anchor), (f"{where} {only} {a_noun(values)}.", checks)]
        case _:  # count
            said = _said(program[1])
            things = [scene.objects[k] for k in in_reading_order(scene).order]
            fit = [thing for thing in things if all(getattr(thing, name) == value for name, value in said.items())]
            every = [{"colour": t.colour, "shape": t.shape, "place": str(t.place)} for t in fit]
            return [(f"There is {a_noun(each)}.", ((("exist", _all(each | said)), "yes"),)) for each in every]


def _all(said: Mapping[str, str]) -> Program:
    some: Program = ("all",)
    for name, value in said.items():
        some = ("filter", name, value, some)
    return some


def _said(some: Program) -> dict[str, str]:
    """What a program's filters say of its objects."""
    said = {}
    while some[0] == "filter":
        _, name, value, some = some
        said[name] = value
    return said


def _beside(some: Program) -> tuple[str, Program]:
    """Relation and anchor of the things that a program filters."""
    while some[0] == "filter":
        some = some[3]
    return some[1], some[2]


def _the(one: Program) -> str:
    """The object, by its filters and by what it lies beside."""
    inner = one
    while inner[0] == "filter":
        inner = inner[3]
    beside = f" {in_words(inner[1])} {_the(inner[2])}" if inner[0] == "beside" else ""
    return f"the {noun(_said(one))}{beside}"


def _valued(kind: str, one: Program, value: str) -> str:
    what = f"{_the(one)[0].upper()}{_the(one)[1:]}"
    if kind == "place":
        return f"{what} is {'in the center' if value == 'center' else f'at the {value}'}."
    return f"{what} is {a_noun({'shape': value}) if kind == 'shape' else value}."


def _counted(some: Program, count: str) -> str:
    number, one = int(count), count == "1"
    return f"There {'is' if one else 'are'} {NUMBERS[number]} {noun(_said(some), many=not one)}."


def summary(conversations: Iterable[tuple[str, list[tuple[str, str]]]]) -> dict[str, Any]:
    """What synthesised instructions are like: kinds, repeats, lengths of answers in words, entropy of answers in bits.

    "repeats" is the share of conversations, without their images, that came before in the same words; "answer_words"
    counts answers by length, in steps of ten words; "answer_entropy_bits" is that of the answers' distribution, and at
    most log2 of their number, "answer_entropy_most_bits".

    Args:
        conversations: kind, and (question, answer) turn by turn.
    """
    kinds: Counter[str] = Counter()
    seen: Counter[tuple[tuple[str, str], ...]] = Counter()
    answers: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for kind, turns in conversations:
        kinds[kind] += 1
        seen[tuple(turns)] += 1
        for _, answer in turns:
            answers[answer] += 1
            lengths[len(answer.split()) // 10 * 10] += 1
    total = sum(answers.values())
    return {
        "kinds": dict(kinds),
        "repeats": 1 - len(seen) / max(1, sum(seen.values())),
        "answer_words": {f"{low}-{low + 9}": lengths[low] for low in sorted(lengths)},
        "answer_entropy_bits": -sum(n / total * math.log2(n / total) for n in answers.values()),
        "answer_entropy_most_bits": math.log2(max(1, total)),
    }
