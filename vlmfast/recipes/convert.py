"""`vlmfast convert`: a checkpoint in another library's form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlmfast.data.tokenize import load_tokenizer
from vlmfast.models import Checkpoint, read_checkpoint, write_checkpoint
from vlmfast.recipes.pretrained import TOKENIZER_FILE


@dataclass(kw_only=True)
class Config:
    """Writes a checkpoint as Hugging Face's transformers or as open_clip loads it, its weights bit for bit.

    For example:
        vlmfast convert --pretrained logs/digits --to hf --out digits-hf
        vlmfast convert --pretrained openai/clip-vit-base-patch32 --to open_clip --out b32
        vlmfast convert --pretrained epoch_32.pt --model ViT-B-32 --to hf --out b32-hf

    Nothing is written where the other library has no such model, or where names or shapes are not what the config says.
    """

    pretrained: str
    """A folder of open_clip, Hugging Face or a run; a file of weights; or a Hugging Face name to download."""
    to: Literal["hf", "open_clip"]
    """hf: transformers' CLIPModel or SiglipModel; open_clip: what it loads as local-dir:FOLDER."""
    out: Path
    """The folder; made if it does not exist, and empty if it does."""
    model: str = ""
    """The released model's name, or a .json of open_clip's: for a bare file, which does not tell its activation."""
    activation: Literal["", "gelu", "gelu_tanh"] = ""
    """Name this activation instead of the checkpoint's. open_clip has SigLIP's first models with gelu alone, though
    they were trained with gelu_tanh: their features then differ a little, as they do in open_clip."""


def run(config: Config) -> None:
    """Writes the folder.

    Args:
        config: the flags.
    Raises:
        DataError: the checkpoint is missing, not whole or not what its config says, or the other library has no such
            model, or the folder is not empty.
    """
    checkpoint = read_checkpoint(config.pretrained, config.model or None)
    if config.activation:
        checkpoint = _activated(checkpoint, config.activation)
    write_checkpoint(checkpoint, config.out, config.to, extra=_tokenizer_config(checkpoint))
    numbers = sum(tensor.numel() for tensor in checkpoint.weights.values())
    print(
        f"{config.out}: {len(checkpoint.weights)} tensors, {numbers:,} numbers, from {checkpoint.source} to {config.to}"
    )
    if not (config.out / TOKENIZER_FILE).exists():
        print("no tokenizer lies beside the checkpoint: put one there, or take the one that the model was trained with")


def _activated(checkpoint: Checkpoint, activation: str) -> Checkpoint:
    kwargs = {"approximate": "tanh"} if activation == "gelu_tanh" else None
    model = checkpoint.config
    towers: dict[str, Any] = {
        "vision_cfg": replace(model.vision_cfg, act_kwargs=kwargs),
        "text_cfg": replace(model.text_cfg, act_kwargs=kwargs),
    }
    return replace(checkpoint, config=replace(model, quick_gelu=False, **towers))


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers needs beside a tokenizer.json of ours, and finds beside its own."""
    path = checkpoint.folder / TOKENIZER_FILE
    if not path.is_file() or (checkpoint.folder / "tokenizer_config.json").is_file():
        return {}
    tokenizer = load_tokenizer(path, checkpoint.config.text_cfg.context_length)
    return {"tokenizer_config.json": tokenizer.settings()}
