"""A model and pictures small enough to embed in no time."""

import io
import json

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file

from vlmfast.data.tokenize import train_tokenizer
from vlmfast.models import ClipConfig, build_clip
from vlmfast.train import save_checkpoint

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": 128}
SIDE, LENGTH = 32, 12
VISION = {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}


def model_and_tokenizer(seed=3, **more):
    """A Clip with random weights, none of which is zero, and its tokenizer."""
    tokenizer = train_tokenizer([f"a {colour} thing" for colour in COLOURS] * 3, 290, LENGTH)
    text = {"context_length": LENGTH, "vocab_size": tokenizer.vocab_size, "width": 32, "heads": 2, "layers": 1}
    config = ClipConfig.from_dict({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text, **more})
    model, generator = build_clip(config, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval(), tokenizer


def write_run(folder, seed=3):
    """The folder, with what `vlmfast train` leaves."""
    model, tokenizer = model_and_tokenizer(seed)
    save_checkpoint(folder / "checkpoints", 2, model, torch.optim.SGD(model.parameters()))
    (folder / "open_clip_config.json").write_text(json.dumps(model.config.to_dict()))
    tokenizer.save(folder / "tokenizer.json")
    return folder


def write_open_clip(folder, model, tokenizer):
    """The folder, with what open_clip's save_pretrained leaves."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(model.config.to_dict()))
    tokenizer.save(folder / "tokenizer.json")
    return folder


def picture(colour, size=(40, 36), seed=0):
    """An image of one colour with some noise in it; of one channel where the colour is a number."""
    channels = () if isinstance(colour, int) else (3,)
    noise = np.random.default_rng(seed).integers(-25, 25, (*size[::-1], *channels))
    return PIL.Image.fromarray((noise + np.array(colour)).clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG"):
    """The content of the image's file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()
