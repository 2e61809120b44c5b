"""What every test runs under: one thread, and unwritten memory that reads as NaN. And `backend`, each one in turn."""

import os

import pytest
import torch

from vlmfast import _ext, available_backends, use_backend
from vlmfast.testing import poisoned_empty

MISSING = {"cpu": f"the compiled extension is missing: {_ext.reason}"}


@pytest.fixture(autouse=True, scope="session")
def _surroundings():
    torch.set_num_threads(1)  # the tensors of tests are small: more threads mostly wait, and wait by spinning
    with poisoned_empty():
        yield


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The name of the backend that every op in the test runs on."""
    name = request.param
    if name not in available_backends():
        required = name in os.environ.get("VLMFAST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(
            f"backend {name!r} cannot run: {MISSING.get(name, 'no reason known')}"
        )
    with use_backend(name):
        yield name
