"""`vlmfast caption`: what images show, in words."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.data.scenes.tasks import INSTRUCTIONS
from vlmfast.errors import DataError
from vlmfast.recipes.vlm_ask import AskFlags, run_ask

POSITIONAL = True


@dataclass(kw_only=True)
class Config(AskFlags):
    """Describes image files, or scenes whose right captions are known.

    For example:
        vlmfast caption photo.jpg --model logs/eyes --num-beams 3
        vlmfast caption --model logs/eyes --level L1 --n 500 --out captions.jsonl
        vlmfast caption --model logs/eyes --level L1 --n 500 --control shuffled --out shuffled.jsonl
        vlmfast eval caption captions.jsonl

    A line has the file, the caption and its probability.
    """

    prompt: str = ""
    """Image files: what the model is told to do. Default: as for scenes, "Describe the image in one sentence." """


def run(config: Config) -> None:
    """Prints or writes the captions.

    Args:
        config: the flags.
    Raises:
        DataError: --prompt without image files, or as `run_ask` says.
    """
    if config.prompt and not config.images:
        raise DataError("--prompt is for image files; --level, --data and --questions have their own")
    told = INSTRUCTIONS.get(config.granularity, INSTRUCTIONS["sentence"])
    run_ask(config, "caption", config.prompt or told)
