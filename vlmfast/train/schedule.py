"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # steps taken before this one -> learning rate of this one


def warmup_cosine(lr: float, warmup_steps: int, total_steps: int, final_lr: float = 0.0) -> Schedule:
    """A schedule that rises linearly to lr, then falls along half a cosine to final_lr.

    Equals, for t the number of steps taken before:
        lr * (t + 1) / warmup_steps                                                  while t < warmup_steps
        final_lr + (lr - final_lr) * (1 + cos(pi * (t - warmup_steps) / (total_steps - warmup_steps))) / 2   after

    Args:
        lr: the highest learning rate.
        warmup_steps: length of the rise in steps; 0 for none.
        total_steps: the step at which final_lr is reached; it stays there.
        final_lr: the lowest learning rate after the rise.

    Returns:
        The schedule.

    Raises:
        ValueError: warmup_steps < 0, or total_steps <= warmup_steps.

    Source: open_clip `cosine_lr`, which has final_lr = 0 and rises again after total_steps.
    """
    if warmup_steps < 0 or total_steps <= warmup_steps:
        raise ValueError(
            f"warmup_cosine: needs 0 <= warmup_steps < total_steps; got {warmup_steps} and {total_steps}. "
            "Shorten the warm-up"
        )

    def at(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        part = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        return final_lr + 0.5 * (1 + math.cos(math.pi * part)) * (lr - final_lr)

    return at


def warmup_constant(lr: float, warmup_steps: int = 0) -> Schedule:
    """A schedule that rises linearly to lr and stays there.

    Args:
        lr: the highest learning rate.
        warmup_steps: length of the rise in steps; 0 for none.

    Returns:
        The schedule.

    Raises:
        ValueError: warmup_steps < 0.

    Source: open_clip `const_lr`.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_constant: warmup_steps must be at least 0; got {warmup_steps}")
    return lambda step: lr * min((step + 1) / max(warmup_steps, 1), 1.0)
