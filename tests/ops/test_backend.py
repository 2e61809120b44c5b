"""use_backend: the last block entered counts, and what is left leaves nothing behind."""

import pytest

from vlmfast import use_backend
from vlmfast.backend import forced_backend
from vlmfast.errors import BackendError


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("VLMFAST_BACKEND", raising=False)


def test_nested_blocks():
    assert forced_backend() is None
    with use_backend("reference"):
        with use_backend("cpu"):
            assert forced_backend() == "cpu"
        assert forced_backend() == "reference"
    assert forced_backend() is None


def test_blocks_that_overlap_as_those_of_two_threads_do():
    """One thread enters, another enters, the first leaves: the second's choice holds, and then nothing does."""
    first, second = use_backend("reference"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert forced_backend() == "cpu"
    second.__exit__(None, None, None)
    assert forced_backend() is None


def test_a_block_left_early_takes_away_its_own_entry():
    """Of two blocks of one name, not the other's."""
    first, second, third = use_backend("cpu"), use_backend("reference"), use_backend("cpu")
    for block in (first, second, third):
        block.__enter__()
    first.__exit__(None, None, None)
    assert forced_backend() == "cpu"
    third.__exit__(None, None, None)
    assert forced_backend() == "reference"
    second.__exit__(None, None, None)
    assert forced_backend() is None


def test_an_error_inside_ends_the_block():
    with pytest.raises(ZeroDivisionError), use_backend("cpu"):
        raise ZeroDivisionError
    assert forced_backend() is None


def test_the_variable_yields_to_a_block(monkeypatch):
    monkeypatch.setenv("VLMFAST_BACKEND", "cpu")
    assert forced_backend() == "cpu"
    with use_backend("reference"):
        assert forced_backend() == "reference"


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(BackendError, match="unknown backend 'gpu'"), use_backend("gpu"):
        pass
    assert forced_backend() is None
    monkeypatch.setenv("VLMFAST_BACKEND", "gpu")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        forced_backend()
