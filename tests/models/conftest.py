"""The libraries that our models are compared with: their tests skip without them, or fail if VLMFAST_REQUIRE says."""

import importlib
import os
import warnings

import pytest
import torch


def _library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another library's
        try:
            return importlib.import_module(name)
        except ImportError as error:
            required = name in os.environ.get("VLMFAST_REQUIRE", "").split(",")
            (pytest.fail if required else pytest.skip)(f"{name} cannot be imported: {error}")


@pytest.fixture(scope="session")
def transformers():
    library = _library("transformers")
    library.logging.set_verbosity_error()
    return library


@pytest.fixture(scope="session")
def open_clip():
    # A torchvision that was built for another torch lacks two ops, which open_clip imports and never calls here.
    declared = []
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            declared.append(torch.library.Library("torchvision", "FRAGMENT"))
            declared[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library = _library("open_clip")
    yield library
    del declared
