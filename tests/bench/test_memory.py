"""The memory meter against allocations of known size."""

import pytest

from vlmfast.bench import memory

MIB = 2**20
pytestmark = pytest.mark.skipif(memory.unmeasurable() is not None, reason=str(memory.unmeasurable()))


def allocate(mib, twice=False):
    """A call that holds `mib` MiB at its peak, or 2 * mib in two pieces, whatever was freed before it."""

    def call():
        piece = b"1" * (mib * MIB)
        return piece + b"1" if twice else None

    for size in (30, 20):  # by habit glibc keeps the second for later, where it would hide what comes
        b"1" * (size * MIB)
    return call


def broken(status):
    raise SystemExit(status)


@pytest.mark.parametrize(("mib", "twice", "expected"), [(1, False, 1), (64, False, 64), (64, True, 128)])
def test_a_known_allocation_is_measured_in_a_child(mib, twice, expected):
    peak = memory.peak_in_child(allocate, mib=mib, twice=twice)
    assert expected * MIB <= peak.extra_bytes + MIB / 2 < (expected + 2) * MIB
    assert peak.process_bytes > peak.extra_bytes


def test_memory_that_the_call_frees_again_counts_and_what_was_there_before_does_not():
    before = b"1" * (64 * MIB)
    peak = memory.peak_of(allocate(96))
    assert 95 * MIB < peak.extra_bytes < 99 * MIB
    assert peak.process_bytes > len(before) + peak.extra_bytes
    assert memory.peak_of(lambda: None).extra_bytes < MIB


def test_a_child_that_dies_says_how():
    with pytest.raises(RuntimeError, match="out of nothing"):
        memory.peak_in_child(broken, status="out of nothing")
    with pytest.raises(RuntimeError, match="exit status 3"):
        memory.peak_in_child(broken, status=3)


def test_a_pass_that_keeps_its_logits_holds_at_least_three_of_them():
    from vlmfast.bench import loss  # here, because the children above need no torch

    order = {"loss": "clip", "batch": 1024, "dim": 32, "dtype": "float32", "seed": 0, "threads": 1, "options": {}}
    eager = memory.peak_in_child(loss.one_pass, provider="eager-one", form="log_softmax", **order)
    assert eager.extra_bytes > 3 * 4 * 1024**2


def test_where_peaks_cannot_be_taken_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert "VmHWM" in memory.unmeasurable()
    (tmp_path / "status").write_text("VmHWM:\t1 kB\n")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    assert "clear_refs" in memory.unmeasurable()
