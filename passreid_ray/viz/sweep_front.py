"""The Pareto front: what no other is better than in one respect without being worse in the other."""

from collections.abc import Sequence

Costs = tuple[float, float]
"""Two figures of which less is better."""


def pareto_front(costs: Sequence[Costs]) -> list[int]:
    """Indices of the costs that no other dominates, by rising first cost; equal ones are all kept.

    One dominates another when it is no worse in both and better in one.
    """
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    front: list[int] = []
    for index in order:
        if not front or costs[index][1] < costs[front[-1]][1] or costs[index] == costs[front[-1]]:
            front.append(index)
    return front
