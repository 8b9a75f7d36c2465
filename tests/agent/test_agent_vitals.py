"""The agent's own figures."""

from __future__ import annotations

import math

from edgekit.agent import vitals


def test_drained_process_is_not_counted_twice(monkeypatch):
    used = {1: 5.0, 2: 1.0}
    monkeypatch.setattr(vitals, "cpu_seconds", used.__getitem__)
    now = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(vitals.time, "monotonic", lambda: next(now))
    meter = vitals.CpuMeter(_at=0.0)
    next(now)
    meter.take([1])
    meter.take([2])
    used[1] = 5.5
    assert math.isclose(meter.take([1]), 50.0)


def test_process_that_is_gone_has_no_figures():
    assert vitals.rss_bytes(2**30) == 0
    assert vitals.cpu_seconds(2**30) == 0.0
