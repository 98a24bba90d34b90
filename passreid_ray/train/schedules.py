"""Schedules are values of the step: nothing to save, nothing to resume."""

import math


def cosine(step: int, *, start: float, end: float, steps: int, warmup_steps: int = 0) -> float:
    """Value at ``step`` of a linear warm-up from 0 to ``start``, then a half cosine towards ``end``.

    As DINO and PASS compute it: the peak is reached at the last warm-up step and held for one more, and ``end`` is
    approached but first reached at ``step == steps``. Later steps keep ``end``. Raises ``ValueError`` if the warm-up is
    longer than the run. Source: DINO (arXiv:2104.14294), ``cosine_scheduler``.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must lie between 0 and steps={steps}, got {warmup_steps}")
    if step < warmup_steps:
        return start * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    if step >= steps:
        return end
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, *, start: float, end: float, steps: int) -> float:
    """Value at ``step`` of a straight line over ``steps`` values from ``start`` to ``end``, then ``end``."""
    if step >= steps:
        return end
    return start + (end - start) * step / max(1, steps - 1)
