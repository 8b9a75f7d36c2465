"""The input contract at serving time: what is refused, and what is only counted.

Names, types, shapes and NaN are refused (:func:`edgekit.dataset.contract.check_feeds`). A value outside the range that the
calibration data had is legal input: it is counted and reported, since it is the first sign of drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.dataset.contract import check_feeds
from edgekit.schema.contract import Contract

Array = NDArray[Any]
PROBABILITY_TOLERANCE = 1e-3


class InputGuard:
    """Checks feeds against a contract, and reads confidence off a classifier's outputs."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._ranges = {
            spec.name: (spec.minimum, spec.maximum)
            for spec in contract.inputs
            if spec.minimum is not None and spec.maximum is not None
        }
        is_classifier = contract.task == "classification" and contract.outputs
        self._scores = contract.outputs[0].name if is_classifier else None

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Refuse what the contract refuses.

        Raises:
            DataError: naming the input and what was expected.
        """
        check_feeds(self._contract, feeds)

    def count_out_of_range(self, feeds: Mapping[str, Array]) -> tuple[int, int]:
        """Samples in the feeds (axis 0 is the batch), and how many have a value outside the calibrated range."""
        samples, worst = 0, 0
        for name, array in feeds.items():
            samples = max(samples, array.shape[0] if array.ndim else 1)
            if name not in self._ranges or not array.size:
                continue
            low, high = self._ranges[name]
            if array.min() >= low and array.max() <= high:
                continue
            flat = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
            worst = max(worst, int(np.count_nonzero(((flat < low) | (flat > high)).any(axis=1))))
        return samples, worst

    def confidence(self, outputs: Mapping[str, Array]) -> tuple[float, int]:
        """Sum and count of the highest class probability; logits go through a softmax. (0, 0) where there are no classes."""
        scores = outputs.get(self._scores) if self._scores else None
        if scores is None or scores.ndim < 2 or scores.dtype.kind != "f" or not scores.size:
            return 0.0, 0
        rows = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
        if rows.min() < 0 or abs(float(rows.sum(axis=1).max()) - 1.0) > PROBABILITY_TOLERANCE:
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
            rows /= rows.sum(axis=1, keepdims=True)
        best = rows.max(axis=1)
        best = best[np.isfinite(best)]
        return float(best.sum()), int(best.size)
