"""Concept drift on a stream of right and wrong answers: labels come, and fewer of them are right.

Four detectors behind one protocol. ``betting`` is edgekit's own and needs nothing: a bet against "answers are wrong at most as
often as expected", whose capital is an e-process, restarted at every step (an e-detector, see :mod:`edgekit.monitor.detector`):
false alarms come once in ``arl`` answers on average or less, however often one looks. ``adwin``, ``page-hinkley`` and ``ddm``
are river's; they look for a change against the stream's own past, need no expectation, and promise nothing of the kind.

    >>> detector = make_detector("betting", expected=0.1, arl=10_000)
    >>> any([detector.update(step % 10 == 0) for step in range(2000)])
    False
    >>> [detector.update(step % 2 == 0) for step in range(100)].index(True)
    18
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.schema.base import Record

ConceptMethod = Literal["betting", "adwin", "page-hinkley", "ddm"]
METHODS: tuple[ConceptMethod, ...] = get_args(ConceptMethod)
STAKES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Parts of the largest stake that can never lose everything."""
MARGIN = 0.01
"""A rise of the error rate by a hundredth does not matter."""
_CAP = 1e4


class ConceptDetector(Protocol):
    """Watches one stream of answers."""

    def update(self, is_wrong: bool) -> bool:  # noqa: FBT001 - the stream's one value
        """Take the next answer; True when drift is found at it. After that the detector begins anew."""
        ...


class BetState(Record, frozen=True, kw_only=True):
    """What the bet remembers: the logarithm of each stake's capital, and how many answers it saw."""

    log_m: tuple[float, ...] = ()
    answers: int = 0

    @property
    def total(self) -> float:
        """Natural logarithm of the mean capital; minus infinity before the first answer."""
        return float(np.logaddexp.reduce(np.asarray(self.log_m))) - math.log(len(self.log_m)) if self.log_m else -math.inf


def bet(state: BetState, *, wrong: float, answers: float, expected: float, margin: float = MARGIN) -> BetState:
    """The state after some answers: a step of the e-detector.

    Args:
        state: before.
        wrong: how many of them were wrong.
        answers: how many there were; 0 changes nothing.
        expected: the largest error rate that is in order, 0..1; it may change from step to step, as long as it does not depend
            on these answers' labels.
        margin: added to it.
    """
    if not answers:
        return state
    rate = min(max(expected + margin, 1e-3), 1 - 1e-3)
    stakes = np.asarray(STAKES) / rate  # a stake of 1 / rate loses everything with the first answer that is right
    gained = wrong * np.log1p(stakes * (1 - rate)) + (answers - wrong) * np.log1p(-stakes * rate)
    before = np.asarray(state.log_m) if state.log_m else np.full(len(STAKES), -np.inf)
    log_m = np.minimum(_CAP, np.logaddexp(before, 0.0) + gained)
    return BetState(log_m=tuple(log_m.tolist()), answers=state.answers + round(answers))


class Betting:
    """The bet as a detector of single answers."""

    def __init__(self, *, expected: float, arl: float, margin: float = MARGIN) -> None:
        self._expected, self._limit, self._margin = expected, math.log(arl), margin
        self.state = BetState()

    def update(self, is_wrong: bool) -> bool:  # noqa: FBT001 - the stream's one value
        """Take the next answer."""
        self.state = bet(self.state, wrong=float(is_wrong), answers=1.0, expected=self._expected, margin=self._margin)
        is_found = self.state.total > self._limit
        if is_found:
            self.state = BetState()
        return is_found


class _OfRiver:
    """A detector of river."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._detector = make, make()

    def update(self, is_wrong: bool) -> bool:  # noqa: FBT001 - the stream's one value
        """Take the next answer."""
        self._detector.update(int(is_wrong))
        is_found = bool(self._detector.drift_detected)
        if is_found:
            self._detector = self._make()
        return is_found


def make_detector(method: str, *, expected: float = 0.0, arl: float = 100_000.0) -> ConceptDetector:
    """A detector by its name.

    Args:
        method: one of ``METHODS``.
        expected: the error rate of the baseline; only ``betting`` uses it.
        arl: answers to a false alarm; only ``betting`` uses it.

    Raises:
        UsageError: ``monitor.concept`` for another name.
        EnvironmentFault: ``river.missing``.
    """
    if method == "betting":
        return Betting(expected=expected, arl=arl)
    if method not in METHODS:
        raise UsageError("monitor.concept", f"concept detector {method!r}: no such.", hint=f"Give one of {', '.join(METHODS)}.")
    try:
        from river import drift  # noqa: PLC0415 - an extra, and seconds to import
        from river.drift import binary  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install 'edgekit[fleet]', or use betting, which needs nothing."
        raise EnvironmentFault(
            "river.missing", f"concept detector {method}: it is river's, not installed.", hint=hint
        ) from error
    makers: dict[str, Callable[[], Any]] = {"adwin": drift.ADWIN, "page-hinkley": drift.PageHinkley, "ddm": binary.DDM}
    return _OfRiver(makers[method])


def find_changes(detector: ConceptDetector, is_wrong: Sequence[bool] | NDArray[np.bool_]) -> tuple[int, ...]:
    """The answers, counted from 0, at which a detector found drift."""
    return tuple(at for at, value in enumerate(is_wrong) if detector.update(bool(value)))
