import pytest
import torch

from vlmfast.bench import timing
from vlmfast.bench.timing import Spread, interleave, spread


def test_spread_interpolates_between_neighbours():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, p20=pytest.approx(1.8), p80=pytest.approx(4.2))
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert spread([1.0, 2.0]).median == 1.5


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one number"):
        spread([])


def test_every_round_makes_every_call_once_and_starts_one_further():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = interleave(calls, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


@pytest.mark.parametrize(("rounds", "seconds", "most", "made"), [(3, 0.0, 9, 3), (1, 5.5, 9, 6), (1, 100.0, 9, 9)])
def test_rounds_go_on_until_the_time_has_passed(rounds, seconds, most, made):
    ticks = iter(range(1000))
    results = interleave({"a": lambda: None}, rounds, seconds=seconds, most=most, clock=lambda: next(ticks))
    assert len(results["a"]) == made


def test_a_pass_leaves_fresh_gradients_and_backward_is_part_of_the_whole():
    leaf = torch.ones(3, requires_grad=True)
    for _ in range(2):
        forward, full = timing.timed_pass(lambda: (2 * leaf).sum(), [leaf])
        assert 0 < forward < full
        assert leaf.grad.tolist() == [2.0, 2.0, 2.0]


def test_threads_are_set_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
