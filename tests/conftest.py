"""What every test runs under: one thread, and unwritten memory that reads as NaN; and the backends in turn."""

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


def forced(name):
    """A context in which every op runs on that backend; without it a skip, or a failure if VLMFAST_REQUIRE names it."""
    if name not in available_backends():
        required = name in os.environ.get("VLMFAST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"backend {name!r} cannot run: {MISSING.get(name, 'unknown why')}")
    return use_backend(name)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The name of the backend that every op in the test runs on."""
    with forced(request.param):
        yield request.param


@pytest.fixture
def cpu_backend():
    """For what only the compiled kernels promise."""
    with forced("cpu"):
        yield "cpu"
