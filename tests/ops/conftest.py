"""What the tests of ops share: a watch on memory that torch does not see."""

from contextlib import contextmanager

import pytest

from vlmfast import _ext


@pytest.fixture
def scratch_below(backend):
    """A context that fails where the compiled kernels hold as many bytes as a float32 matrix of so many elements."""

    @contextmanager
    def watch(elements):
        if backend == "cpu":
            _ext.C.scratch_peak(True)
        yield
        if backend == "cpu":
            peak = _ext.C.scratch_peak(True)
            assert 0 < peak < 4 * elements, f"{peak} bytes of scratch memory; {4 * elements} would hold the matrix"

    return watch
