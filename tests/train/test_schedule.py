"""Learning rates as open_clip's formulas give them."""

import math

import pytest

from vlmfast.train import warmup_constant, warmup_cosine


def open_clip_cosine(lr, warmup, total, step):
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * lr


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 2), (10, 100), (99, 100)])
def test_cosine_is_open_clips(warmup, total):
    schedule = warmup_cosine(5e-4, warmup, total)
    for step in range(total):
        assert schedule(step) == pytest.approx(open_clip_cosine(5e-4, warmup, total, step), rel=1e-12, abs=1e-18)


def test_cosine_at_the_marks():
    schedule = warmup_cosine(1.0, 10, 110, final_lr=0.1)
    assert [schedule(0), schedule(9), schedule(10)] == [0.1, 1.0, 1.0]
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == pytest.approx(0.1)
    assert schedule(500) == schedule(110), "stays low after the end; open_clip's rises again"


def test_constant():
    schedule = warmup_constant(0.3, 3)
    assert [schedule(t) for t in (0, 1, 2, 3, 999)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert warmup_constant(0.3)(0) == 0.3


@pytest.mark.parametrize("wrong", [(-1, 10), (10, 10), (11, 10)])
def test_refuses_a_warmup_that_does_not_fit(wrong):
    with pytest.raises(ValueError, match=f"got {wrong[0]} and {wrong[1]}"):
        warmup_cosine(1.0, *wrong)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        warmup_constant(1.0, -1)
