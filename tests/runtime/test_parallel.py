"""Batches on several threads: in order, no more ahead than asked for, errors at their place."""

from __future__ import annotations

import threading

import pytest

from edgekit.runtime.parallel import in_order


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_are_in_the_order_of_the_items(workers):
    gates = [threading.Event() for _ in range(8)]

    def answer(index: int) -> int:
        if workers > 1 and index % 2 == 0:
            assert gates[index + 1].wait(10)  # the odd one behind it is done first
        gates[index].set()
        return index

    assert list(in_order(answer, range(8), workers)) == list(range(8))


def test_items_are_taken_only_as_they_are_needed():
    taken = []

    def items():
        for index in range(100):
            taken.append(index)
            yield index

    results = in_order(lambda value: value, items(), 3)
    assert next(results) == 0
    assert len(taken) == 3
    results.close()
    assert len(taken) == 3


def test_an_error_comes_at_its_place():
    def answer(index: int) -> int:
        if index == 2:
            raise ValueError("the third")
        return index

    results = in_order(answer, range(5), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)
