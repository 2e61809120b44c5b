"""What every test runs under: one thread, and unwritten memory that reads as NaN; and the backends in turn.

On a machine with a GPU the triton backend is one of them, and what its tests make lies there: torch's default device is
"cuda" then. Everything else runs on the CPU.
"""

import importlib
import os
import re
import warnings
from contextlib import contextmanager

import numpy
import pytest
import torch

from vlmfast import _ext, available_backends, use_backend
from vlmfast.ops import _limits, _tiles
from vlmfast.testing import poisoned_empty

# Deterministic algorithms, which `_surroundings` asks for, need this of cuBLAS before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = torch.cuda.is_available() and not _tiles.MISSING and not _tiles.INTERPRET
REQUIRED = os.environ.get("VLMFAST_REQUIRE", "").split(",")
MISSING = {
    "cpu": f"the compiled extension is missing: {_ext.reason}",
    "triton": _tiles.MISSING or "there is no GPU; for the interpreter run: make test-interpret",
}
# Under Triton's interpreter only its kernels are tested: all else runs faster without it.
BACKENDS = ["triton"] if _tiles.INTERPRET else ["reference", "cpu"] + ["triton"] * (GPU or "triton" in REQUIRED)

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
    too_large = re.compile("|".join(NOT_INTERPRETED))
    left_out = [item for item in items if "gpu" in item.fixturenames or too_large.search(item.nodeid)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _surroundings():
    torch.set_num_threads(1)  # the tensors of tests are small: more threads mostly wait, and wait by spinning
    if _tiles.INTERPRET:
        numpy.seterr(all="ignore")  # what numpy warns of, infinity times 0 say, is what a GPU computes without a word
    with poisoned_empty():
        yield


@contextmanager
def forced(name):
    """Every op runs on that backend, and tensors are made where it runs; without it as `missing` says."""
    device = "cuda" if name == "triton" and GPU else "cpu"
    if name not in available_backends(device):
        missing(name)
    with use_backend(name):
        if device == "cpu":
            yield
        else:
            with torch.device(device):
                yield


def missing(name):
    """Skips the test, or fails it if VLMFAST_REQUIRE names the backend."""
    (pytest.fail if name in REQUIRED else pytest.skip)(
        f"backend {name!r} cannot run: {MISSING.get(name, 'unknown why')}"
    )


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
    """For what only the Triton kernels promise; a few hundred rows are several blocks of S, and of G.

    In the precision that docs/numerics.md's tolerances are for, which is not a GPU's default.
    """
    monkeypatch.setattr(_tiles, "EDGE", 256)
    monkeypatch.setattr(_limits, "MAX_WORKSPACE", 2**18)
    monkeypatch.setattr(_limits, "PRECISION", "ieee")
    with forced("triton"):
        yield "triton"


@pytest.fixture
def gpu():
    """For what only a GPU can show: the Triton kernels on it, with everything as it is shipped."""
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
