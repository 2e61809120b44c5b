"""Randomness without a state: random numbers and permutations that depend on their key alone."""

from __future__ import annotations

from typing import Any

import numpy as np

BITS = 2**64 - 1


def random_int(*words: int) -> int:
    """64 random bits, as an int, that depend on the words (modulo 2**64) and their order alone.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied after each word.
    """
    return _mixed(words)


def random_bits(*words: int | np.ndarray) -> np.ndarray:
    """uint64 array of `random_int` for each entry of the arrays among the words, of which there is at least one."""
    return _mixed(words)


def _mixed(words: tuple[int | np.ndarray, ...]) -> Any:
    state: Any = 0x9E3779B97F4A7C15
    for word in words:
        word = word.astype(np.uint64) if isinstance(word, np.ndarray) else int(word) & BITS  # negative ones wrap
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & BITS
        state = state ^ (state >> 31)
    return state


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64, the numbers 0 .. n - 1 in an order that depends on n and the key alone."""
    return np.argsort(random_bits(*key, np.arange(n)), kind="stable")
