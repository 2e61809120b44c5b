"""`vlmfast vqa`: answers to questions about images, with their confidence."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.errors import DataError
from vlmfast.recipes.vlm_ask import AskFlags, run_ask

POSITIONAL = True


@dataclass(kw_only=True)
class Config(AskFlags):
    """Answers questions about image files, about scenes, or of a file.

    For example:
        vlmfast vqa photo.jpg --model logs/eyes --question "What colour is the circle?"
        vlmfast vqa photo.jpg --model logs/eyes --question "Is there a star?" --candidates yes,no
        vlmfast vqa --model logs/eyes --level L1 --n 500 --rank --out answers.jsonl
        vlmfast vqa --model logs/eyes --level L3 --cooc --vlm-task pope-adversarial --out pope.jsonl
        vlmfast vqa --model llava-1.5-7b-hf --questions coco_pope_random.json --image-folder val2014 --out pope.jsonl
        vlmfast vqa --model logs/eyes --questions mine.jsonl --image-folder photos --candidates yes,no
        vlmfast eval vqa answers.jsonl

    A line has the file, the answer and its confidence: the answer's probability, its end included, or, where it is
    chosen among candidates, its share of theirs.
    """

    question: str = ""
    """What is asked about each image file."""
    candidates: str = ""
    """Possible answers to each question, joined by commas: the likeliest of them is the answer. Not of scenes, which
    have their own."""
    vlm_task: str = "vqa"
    """scenes: vqa, or from L2 on pope-random, pope-popular or pope-adversarial."""
    rank: bool = False
    """scenes: choose among each question's possible answers by likelihood, instead of writing."""


def run(config: Config) -> None:
    """Prints or writes the answers.

    Args:
        config: the flags.
    Raises:
        DataError: --question without image files, or as `run_ask` says.
    """
    if config.question and not config.images:
        raise DataError("--question is for image files; --level, --data and --questions have their own")
    candidates = [word.strip() for word in config.candidates.split(",") if word.strip()]
    run_ask(config, config.vlm_task, config.question, candidates, config.rank)
