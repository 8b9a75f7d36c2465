"""The fleet's story at a small size, with everything real: scripts/bench/fleet.py has it at 10,000 devices."""

from __future__ import annotations

import pytest
from plain_mosquitto import needs_mosquitto

from scripts.bench.fleet import Story


@needs_mosquitto
@pytest.mark.fault("F26")
@pytest.mark.fault("F27")
def test_bad_release_halts_and_a_killed_server_goes_on(tmp_path):
    story = Story(
        folder=tmp_path,
        devices=40,
        telemetry="1s",
        faults="fail=15%,silent=15%",
        self_test="200ms",
        probation="500ms",
        deadline_min=0.05,
        soak_min=0.001,
        waves="40%,100%",
    )
    try:
        story.begin()
        story.halt_bad_release()
        story.survive()
        story.end()
    finally:
        story.stop()
    figures = story.figures
    assert 0 < figures["bad_release_asked"] <= figures["bad_release_first_wave"]
    assert figures["bad_release_reason"]
    assert (figures["resumed_state"], figures["asked_twice"], figures["never_asked"]) == ("done", 0, 0), figures
    assert figures["asked_before_kill"] < 40
    ledger = figures["ledger"]
    assert (ledger["lost"], ledger["doubled"], ledger["foreign"]) == (0, 0, 0), ledger
    assert ledger["stored"] == ledger["sent"] > 500
    assert figures["committed"] >= 40
