"""The libraries that our models are compared with: their tests skip without them, or fail if VLMFAST_REQUIRE says."""

import importlib
import os
import warnings

import pytest
import torch

DECLARED: list[torch.library.Library] = []  # gone when their last reference goes


def _library(name):
    # A torchvision that was built for another torch lacks two ops, which the others import and never call here.
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            DECLARED[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
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
    return _library("open_clip")
