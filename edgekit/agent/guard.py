"""The input contract at serving time, and the confidence of what comes out.

What is refused, clipped, filled in or passed and counted is :class:`edgekit.dataset.guarding.Guard`'s to say, from the contract
in the bundle. A value outside the range that the calibration data had is legal input unless the contract says otherwise: it is
counted and reported, since it is the first sign of drift (:mod:`edgekit.agent.violations` makes an event of many).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.dataset.guarding import Guard, GuardedFeeds, RefusedError, Verdict
from edgekit.schema.contract import Contract

__all__ = ["GuardedFeeds", "InputGuard", "RefusedError", "Verdict"]

Array = NDArray[Any]
PROBABILITY_TOLERANCE = 1e-3


class InputGuard(Guard):
    """Judges feeds by a contract, and reads confidence off a classifier's outputs."""

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract)
        is_classifier = contract.task == "classification" and contract.outputs
        self._scores = contract.outputs[0].name if is_classifier else None

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
