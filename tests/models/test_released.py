"""Every released model has the tensors, names and shapes, of open_clip's and of Hugging Face's."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from vlmfast.errors import DataError
from vlmfast.models import Clip, ModifiedResNet, config_names, load_config
from vlmfast.models.weights import hf
from vlmfast.models.weights import open_clip as names
from vlmfast.models.weights.table import outward

OWN = {"CLIP-tiny", "digits"}
RELEASED = [name for name in config_names() if name not in OWN]
# name -> [tensors, numbers in them, SHA-256 of their names and shapes, and what has no tensor: heads, pooling,
# activation and eps of the image tower (a ResNet's heads alone), the same of the text tower and whether it is causal],
# taken from open_clip 3.3.0; a test below looks whether it is true.
GOLDEN = json.loads((Path(__file__).parent / "open_clip_shapes.json").read_text())


def fingerprint(state):
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    numbers = sum(tensor.numel() for tensor in state.values())
    return [len(lines), numbers, hashlib.sha256("\n".join(lines).encode()).hexdigest()]


def built(name):
    with torch.device("meta"):
        return Clip(load_config(name))


def what_has_no_tensor(model):
    config, vision, text = model.config, model.config.vision_cfg, model.config.text_cfg
    if isinstance(model.visual, ModifiedResNet):
        image = [model.visual.attnpool.heads]
    else:
        heads = model.visual.transformer.resblocks[0].attn.heads
        image = [heads, vision.pool_type, config.activation(vision), model.visual.ln_post.eps]
    block = model.transformer.resblocks[0]
    return [*image, block.attn.heads, text.pool_type, config.activation(text), block.ln_1.eps, block.attn.causal]


@pytest.mark.parametrize("name", RELEASED)
def test_tensors_are_open_clips(name):
    model = built(name)
    state = model.state_dict()
    shapes = fingerprint(outward(state, names.rows(model.config, list(state))))
    assert [*shapes, *what_has_no_tensor(model)] == GOLDEN[name]


def test_every_released_model_of_openai_is_here():
    towers = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"]
    assert {f"{tower}-quickgelu" for tower in towers} <= set(RELEASED)
    assert set(GOLDEN) == set(RELEASED)


def said_by_open_clip(open_clip, name):
    """The golden line of a model, from open_clip."""
    config = open_clip.get_model_config(name)
    custom = config.pop("custom_text", False)
    with torch.device("meta"):
        model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config)
    kinds = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELU": "gelu"}

    def tower(block, pool, act, norm):
        found = getattr(block.mlp, act)
        kind = "gelu_tanh" if getattr(found, "approximate", "") == "tanh" else kinds[type(found).__name__]
        return [block.attn.num_heads, pool, kind, getattr(block, norm).eps]

    trunk, text = getattr(model.visual, "trunk", None), getattr(model, "text", model)
    if trunk is not None:
        image = tower(trunk.blocks[0], trunk.global_pool, "act", "norm1")
    elif hasattr(model.visual, "transformer"):
        image = tower(model.visual.transformer.resblocks[0], model.visual.pool_type, "gelu", "ln_1")
    else:
        image = [model.visual.attnpool.num_heads]
    pool = model.text.pool_type if custom else model.text_pool_type
    words = tower(text.transformer.resblocks[0], pool, "gelu", "ln_1")
    return [*fingerprint(model.state_dict()), *image, *words, text.attn_mask is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # another library's
def test_the_golden_file_is_open_clips(open_clip):
    assert {name: said_by_open_clip(open_clip, name) for name in RELEASED} == GOLDEN


PLAIN = [name for name in RELEASED if not name.endswith("-quickgelu")]  # the activation has no tensor
HF_CANNOT = [
    ("RN50", "a ResNet"),
    ("ViT-H-14-CLIPA", "no ln_pre, image pooling 'avg', a text tower that is not causal, text pooling 'last'"),
    ("ViT-SO400M-16-SigLIP-i18n-256", "no bias in the text projection"),
]


@pytest.mark.filterwarnings("ignore")  # another library's
@pytest.mark.parametrize("name", [name for name in PLAIN if not re.search("RN|CLIPA|SO400M-16-SigLIP-i18n", name)])
def test_tensors_are_hugging_faces(transformers, name):
    model = built(name)
    described = hf.config_file(model.config)
    described.pop("architectures")
    kind = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[described.pop("model_type")]
    with torch.device("meta"):
        theirs = kind(kind.config_class(**described))
    assert fingerprint(outward(model.state_dict(), hf.rows(model.config))) == fingerprint(theirs.state_dict())


@pytest.mark.parametrize(("name", "reasons"), HF_CANNOT)
def test_what_hugging_face_has_no_place_for_is_named(name, reasons):
    with pytest.raises(DataError, match=rf"^to hf: transformers' \w+ has no place for: {reasons}$"):
        hf.config_file(load_config(name))
