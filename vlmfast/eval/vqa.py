"""Scores of answers: the VQA accuracy of ten annotators with its official normaliser, and exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlmfast.errors import DataError

RULES = ("official", "lavis", "fixed")
FEWEST = 4  # answers: with three, an answer that all of them give is left with two that agree

ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS.split())}
# Each is also written without one of its apostrophes, and that is what the normaliser mends.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}
PERIOD = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"\d,\d")


def normalize_answer(text: str, *, fixed: bool = False) -> str:
    """The answer as the VQA evaluator compares it: without punctuation, case and articles, numbers up to ten in digits.

    Its quirks:
        - A punctuation mark is deleted where a space stands on one side of it anywhere in the answer, else it becomes a
          space; where the answer has a comma between two digits, every mark of any kind is deleted.
        - The period's pattern, `(?!<=\\d)(\\.)(?!\\d)`, writes "(?!<=" where "(?<!" was meant, which is true of every
          period: any that no digit follows is deleted. The pattern as meant would keep that of "3.", so that "3." and
          "3" differed, which its authors' words ("except if it occurs as decimal") do not ask for.
        - `re.UNICODE` stands where `sub` takes a count: only the first 32 such periods are deleted.
        - "none" is 0; "somebody'd" loses its apostrophe; "lets", "shes", "im" and "ive" get none.

    Args:
        text: an answer.
        fixed: delete every period that is no decimal point, turn the other marks of an answer with a thousands comma
            into spaces by the rule for all, and leave "somebody'd" alone.
    Source: Antol et al. 2015; the official evaluator's processPunctuation and processDigitArticle.
    """
    return _words(_strip_marks(text, fixed), fixed)


def vqa_accuracy(answer: str, references: Sequence[str], *, rule: str = "official") -> float:
    """The VQA accuracy of an answer: min(1, agreeing annotators / 3), meaned over leaving each annotator out.

    Equals, over each of the annotators left out in turn:
        mean(min(1, sum(other == answer for other in the_others) / 3))

    Args:
        answer: what is scored.
        references: the annotators' answers, ten as a rule and at least four. Ten times one answer make a question with
            a single right answer.
        rule: what is normalised before it is compared.
            "official" (of 2021): answer and references, but nothing where all references are one and the same text:
            then the answer "Yes." does not match ten "yes".
            "lavis": the official evaluator's rule until 2021, which LAVIS, BLIP-2 and Qwen-VL took over: the answer
            always; of the references only the punctuation, and only where they are not all the same. The answer "two"
            becomes "2", and does not match the reference "two".
            "fixed": always both, by the fixed normaliser.
    Raises:
        DataError: fewer than four references, with which no answer could reach 1.
        ValueError: rule is none of the three.
    Source: Antol et al. 2015, sec. 4; the official evaluator, commits 458a8b2 ("lavis") and a013f00 ("official").
    """
    if rule not in RULES:
        raise ValueError(f"vqa_accuracy: rule must be one of {', '.join(RULES)}; got {rule!r}")
    if len(references) < FEWEST:
        raise DataError(
            f"vqa_accuracy: needs {FEWEST} references or more, of which one is left out at a time; got "
            f"{len(references)}. With fewer, use exact_match"
        )
    fixed, differ = rule == "fixed", len({_stripped(each) for each in references}) > 1
    if rule == "lavis":
        answer = normalize_answer(_stripped(answer))
        differ = len(set(references)) > 1
        references = [_strip_marks(each, False) for each in references] if differ else references
    else:
        answer, references = _stripped(answer), [_stripped(each) for each in references]
        if differ or fixed:
            answer = normalize_answer(answer, fixed=fixed)
            references = [normalize_answer(each, fixed=fixed) for each in references]
    agreeing = sum(each == answer for each in references)
    left_out = [agreeing - (each == answer) for each in references]
    return sum(min(1.0, others / 3) for others in left_out) / len(references)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references, but for case, white space and one period at the end.

    Args:
        answer: what is scored.
        references: the right answers.
    Raises:
        DataError: references is empty, or one text instead of a sequence of them.
    """
    if isinstance(references, str) or not references:
        raise DataError(f"exact_match: references must be one text or more; got {references!r}")
    return _bare(answer) in {_bare(each) for each in references}


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_marks(text: str, fixed: bool) -> str:
    """The evaluator's processPunctuation."""
    out = re.sub(r"(?<=\d),(?=\d)", "", text) if fixed else text
    thousands = not fixed and THOUSANDS.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or thousands else " ")
    return PERIOD.sub("", out, count=0 if fixed else int(re.UNICODE))


def _words(text: str, fixed: bool) -> str:
    """The evaluator's processDigitArticle."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in ARTICLES]
    return " ".join(word if fixed and word == "somebody'd" else CONTRACTIONS.get(word, word) for word in kept)
