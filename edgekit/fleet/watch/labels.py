"""Labels that came as messages of their own: those that a device could not count, and how labelled answers are chosen.

A label belongs to its prediction: where a sample of that prediction is here, its time and class are the prediction's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, and_, select

from edgekit.fleet import tables
from edgekit.monitor.intervals import ALL
from edgekit.monitor.performance import CONFIDENCE_BINS

MAX_LABELS = 50_000


@dataclass
class LabelFigures:
    """Of one slice: labels that no window counts, and all labels that carry a confidence, by its bin."""

    labelled: int = 0
    right: int = 0
    labelled_by_confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    right_by_confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(CONFIDENCE_BINS))
    ages_ms: list[int] = field(default_factory=list)

    @property
    def age_ms(self) -> int | None:
        """Median time from a prediction to its label."""
        return round(median(self.ages_ms)) if self.ages_ms else None

    def add(self, *, is_right: bool, is_counted: bool, confidence: float, age_ms: int | None) -> None:
        """One label."""
        if not is_counted:
            self.labelled += 1
            self.right += is_right
        if 0 < confidence <= 1:
            at = min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)
            self.labelled_by_confidence[at] += 1
            self.right_by_confidence[at] += is_right
        if age_ms is not None and age_ms >= 0:
            self.ages_ms.append(age_ms)


def read_labels(connection: Connection, digests: Sequence[str], *, since_ms: int) -> dict[str, LabelFigures]:
    """The newest labels of some models since a moment, over all devices and by site.

    Labels whose prediction nobody remembers say nothing of right or wrong, and are left out.
    """
    label, sample, device = tables.labels.c, tables.samples.c, tables.devices.c
    same = and_(sample.device_id == label.device_id, sample.prediction_id == label.prediction_id)
    statement = (
        select(
            device.site,
            label.label,
            label.predicted,
            label.confidence,
            label.is_counted,
            label.time_ms,
            sample.predicted.label("sample_predicted"),
            sample.confidence.label("sample_confidence"),
            sample.time_ms.label("predicted_ms"),
        )
        .join(device_table := tables.devices, device_table.c.id == label.device_id)
        .outerjoin(tables.samples, same)
        .where(label.model_digest.in_(list(digests)), label.time_ms >= since_ms)
        .order_by(label.time_ms.desc())
        .limit(MAX_LABELS)
    )
    found: dict[str, LabelFigures] = {}
    for item in connection.execute(statement):
        predicted = item.predicted or item.sample_predicted or ""
        if not predicted:
            continue
        age_ms = item.time_ms - item.predicted_ms if item.predicted_ms is not None else None
        for name in (ALL, f"site={item.site}"):
            found.setdefault(name, LabelFigures()).add(
                is_right=predicted == item.label,
                is_counted=item.is_counted,
                confidence=item.confidence or item.sample_confidence or 0.0,
                age_ms=age_ms,
            )
    return found
