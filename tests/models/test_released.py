"""Every released model has the tensors, names and shapes, of open_clip's and of Hugging Face's."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from vlmfast.errors import DataError
from vlmfast.models import Clip, config_names, load_config
from vlmfast.models.weights import hf
from vlmfast.models.weights import open_clip as names
from vlmfast.models.weights.table import outward

OWN = {"CLIP-tiny", "digits"}
RELEASED = [name for name in config_names() if name not in OWN]
# name -> [tensors, numbers in them, SHA-256 of their names and shapes], taken from open_clip 3.3.0 by the test below.
GOLDEN = json.loads((Path(__file__).parent / "open_clip_shapes.json").read_text())


def fingerprint(state):
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    numbers = sum(tensor.numel() for tensor in state.values())
    return [len(lines), numbers, hashlib.sha256("\n".join(lines).encode()).hexdigest()]


def built(name):
    with torch.device("meta"):
        return Clip(load_config(name))


@pytest.mark.parametrize("name", RELEASED)
def test_tensors_are_open_clips(name):
    model = built(name)
    state = model.state_dict()
    assert fingerprint(outward(state, names.rows(model.config, list(state)))) == GOLDEN[name]


def test_every_released_model_of_openai_is_here():
    towers = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"]
    assert {f"{tower}-quickgelu" for tower in towers} <= set(RELEASED)
    assert set(GOLDEN) == set(RELEASED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # another library's
def test_the_golden_file_is_open_clips(open_clip):
    for name in RELEASED:
        config = open_clip.get_model_config(name)
        custom = config.pop("custom_text", False)
        with torch.device("meta"):
            theirs = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config)
        assert fingerprint(theirs.state_dict()) == GOLDEN[name], name


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
