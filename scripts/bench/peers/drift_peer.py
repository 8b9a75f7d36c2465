# ruff: noqa: PLC0415 - each of the tools is in another environment
"""Runs another tool's drift tests on windows, in that tool's own environment: no edgekit here.

    PEER/bin/python drift_peer.py evidently|alibi-detect|river CASES.npz ALARMS.npz

CASES holds, for case i, ``reference_i`` [m] and ``stream_i`` [windows, n]. ALARMS gets, for method name M and case i, a boolean
vector [windows] ``M/i``: whether the tool says drift in that window.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

warnings.simplefilter("ignore")
P_VALUES = (0.05, 0.001, 1e-5)
Found = dict[str, np.ndarray]


def evidently(reference: np.ndarray, stream: np.ndarray) -> Found:
    """Its stattests with its own thresholds, and with stricter ones."""
    import pandas as pd
    from evidently.legacy.calculations.stattests import (
        jensenshannon_stat_test,
        ks_stat_test,
        psi_stat_test,
        wasserstein_stat_test,
    )
    from evidently.legacy.core import ColumnType

    known = pd.Series(reference)
    tests = (
        ("wasserstein", wasserstein_stat_test, (0.1, 0.2, 0.3), True),
        ("jensenshannon", jensenshannon_stat_test, (0.1, 0.2), True),
        ("psi", psi_stat_test, (0.1, 0.2, 0.4), True),
        ("ks", ks_stat_test, P_VALUES, False),
    )
    found: Found = {}
    for name, test, thresholds, is_distance in tests:
        scores = np.array([test.func(known, pd.Series(window), ColumnType.Numerical, 0.1)[0] for window in stream])
        for threshold in thresholds:
            is_default = threshold == test.default_threshold and name == "wasserstein"
            label = f"evidently {name} {threshold:g}{' (its default here)' if is_default else ''}"
            found[label] = scores >= threshold if is_distance else scores <= threshold
    return found


def alibi_detect(reference: np.ndarray, stream: np.ndarray) -> Found:
    """Its offline detectors, window by window."""
    from alibi_detect.cd import CVMDrift, KSDrift

    found: Found = {}
    for name, kind in (("KSDrift", KSDrift), ("CVMDrift", CVMDrift)):
        detector = kind(reference.reshape(-1, 1), p_val=0.05)
        scores = np.array([float(detector.predict(window.reshape(-1, 1))["data"]["p_val"][0]) for window in stream])
        for threshold in P_VALUES:
            label = f"alibi-detect {name} p<{threshold:g}{' (its default)' if threshold == 0.05 else ''}"
            found[label] = scores < threshold
    return found


def river(reference: np.ndarray, stream: np.ndarray) -> Found:
    """Its detectors on the values one by one; they learn from the last 2,000 of the reference first.

    Without KSWIN: at 700 values a second it would take hours.
    """
    from river import drift

    makers: dict[str, Callable[[], object]] = {
        "river ADWIN 0.002 (its default)": drift.ADWIN,
        "river ADWIN 1e-05": lambda: drift.ADWIN(delta=1e-5),
        "river PageHinkley 50 (its default)": drift.PageHinkley,
        "river PageHinkley 200": lambda: drift.PageHinkley(threshold=200.0),
    }
    return {name: _run_online(make, reference[-2000:], stream) for name, make in makers.items()}


def _run_online(make: Callable[[], object], reference: np.ndarray, stream: np.ndarray) -> np.ndarray:
    detector = make()
    for value in reference:
        detector.update(float(value))
    alarms = np.zeros(len(stream), dtype=bool)
    for at, window in enumerate(stream):
        for value in window:
            detector.update(float(value))
            alarms[at] |= detector.drift_detected
    return alarms


def read_cases(path: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, reference and stream of each case."""
    with np.load(path) as data:
        count = sum(1 for name in data.files if name.startswith("stream_"))
        for number in range(count):
            yield number, data[f"reference_{number}"], data[f"stream_{number}"]


def main() -> None:
    """Judge all cases."""
    peer, cases, out = sys.argv[1:4]
    run = {"evidently": evidently, "alibi-detect": alibi_detect, "river": river}[peer]
    found: Found = {}
    started = time.monotonic()
    for number, reference, stream in read_cases(cases):
        for name, alarms in run(reference, stream).items():
            found[f"{name}/{number}"] = alarms
    np.savez_compressed(out, **found)
    print(f"{peer}: {time.monotonic() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
