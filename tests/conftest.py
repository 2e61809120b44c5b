"""What every test runs under: one thread, and unwritten memory that reads as NaN; and the backends in turn."""

import importlib
import os
import re
import warnings

import numpy
import pytest
import torch

from vlmfast import _ext, available_backends, use_backend
from vlmfast.ops import _limits, _tiles
from vlmfast.testing import poisoned_empty

MISSING = {
    "cpu": f"the compiled extension is missing: {_ext.reason}",
    "triton": _tiles.MISSING or "run: make test-interpret",
}
# Under Triton's interpreter only its kernels are tested: all else runs faster without it.
BACKENDS = ["triton"] if _tiles.INTERPRET else ["reference", "cpu"]

# The interpreter takes some 10 ms for a tile: what it does not run, and why that loses little.
NOT_INTERPRETED = {
    r"float16.*-385-640|-385-640.*float16": "the widest shape runs in float32, the dtypes on the others",
    r"rows_around_a_tile.*-(11|12|31|32|95|96|383|384)\]": "tiles end at multiples of 64 here: 13, 33, 97 and 385 do",
    r"never_hidden\[triton-False|never_hidden.*--inf-": "rows as given, and -inf, take the same paths",
    r"bfloat16_gradients_do_not_lose": "gradients are summed by torch.addmm, in float32",
    r"bits_repeat": "programs run in one order anyway",
    r"thousand_matrices": "a thousand launches; the formula is that of the other tests",
    r"every_half_is_read_exactly": "65536 rows; numpy reads halves, not a GPU",
    r"held\[triton-(False|True-hardest)": "the same buffers as with gradients",
    r"random_towers_at_scale_100.*1000": "8 and 64 towers run",
}


def pytest_collection_modifyitems(config, items):
    if not _tiles.INTERPRET:
        return
    left_out = [item for item in items if any(re.search(pattern, item.nodeid) for pattern in NOT_INTERPRETED)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _surroundings():
    torch.set_num_threads(1)  # the tensors of tests are small: more threads mostly wait, and wait by spinning
    if _tiles.INTERPRET:
        numpy.seterr(all="ignore")  # what numpy warns of, infinity times 0 say, is what a GPU computes without a word
    with poisoned_empty():
        yield


def forced(name):
    """A context in which every op runs on that backend; without it a skip, or a failure if VLMFAST_REQUIRE names it."""
    if name not in available_backends():
        required = name in os.environ.get("VLMFAST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"backend {name!r} cannot run: {MISSING.get(name, 'unknown why')}")
    return use_backend(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of the backend that every op in the test runs on."""
    if request.param == "triton":
        yield request.getfixturevalue("triton_backend")
    else:
        with forced(request.param):
            yield request.param


@pytest.fixture
def triton_backend(monkeypatch):
    """For what only the Triton kernels promise; a few hundred rows are several blocks of S, and of G."""
    monkeypatch.setattr(_tiles, "EDGE", 256)
    monkeypatch.setattr(_limits, "MAX_WORKSPACE", 2**18)
    with forced("triton"):
        yield "triton"


@pytest.fixture
def cpu_backend():
    """For what only the compiled kernels promise."""
    with forced("cpu"):
        yield "cpu"


DECLARED: list[torch.library.Library] = []  # gone when their last reference goes


def _library(name):
    """Another library to compare with; without it a skip, or a failure if VLMFAST_REQUIRE names it."""
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
