"""`vlmfast bench model`: what a training step of a whole CLIP costs, ours beside open_clip's."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfast.bench import model


@dataclass(frozen=True)
class Config(model.ModelBench):
    """Measures a training step, uint8 images to AdamW, ours beside open_clip's model with the same weights.

    For example:
        vlmfast bench model --model ViT-B-32 --batch 32 --caption-length 15
        vlmfast bench model --model ViT-B-32 --batch 32 --caption-length 77 --json step.json
        vlmfast bench model --device cuda --precision amp_bf16 --batch 1024 --caption-length real \\
            --providers vlmfast,open_clip,open_clip-compile
    """


def run(config: Config) -> None:
    """Runs the benchmark, writes the file that is named and prints the table.

    Args:
        config: the flags.
    """
    model.main(config)
