from __future__ import annotations

import pytest

from edgekit.errors import UsageError
from edgekit.fleet.simulator.options import Shift, SimulatorOptions, check_options, parse_duration, parse_faults, parse_share
from edgekit.fleet.simulator.releases import invent_release
from edgekit.fleet.simulator.running import split


def test_faults_as_people_type_them():
    found = parse_faults("fail=5%, silent=.1,drift=.3@10min/20%,concept=.2,regress=.4,clock=1%")
    assert (found.fail, found.silent, found.clock, found.regress) == (0.05, 0.1, 0.01, 0.4)
    assert found.drift == Shift(size=0.3, after_s=600.0, share=0.2)
    assert found.concept == Shift(size=0.2)
    assert parse_faults("") == parse_faults(" , ")


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("fial=5%", "faults.unknown", "fail"),
        ("fail=120%", "config.invalid", "fail"),
        ("fail=", "config.invalid", "fail"),
        ("drift=x@10min", "config.invalid", "drift"),
        ("drift=.3@soon", "config.invalid", "faults"),
    ],
)
def test_fault_that_makes_no_sense_is_named(text, code, named):
    with pytest.raises(UsageError) as caught:
        parse_faults(text)
    assert caught.value.code == code
    assert named in f"{caught.value.message} {caught.value.hint}"


def test_durations_and_shares():
    assert [parse_duration(text, "--for") for text in ("500ms", "30s", "10min", "2h", "1d", "7")] == [
        0.5, 30, 600, 7200, 86400, 7,
    ]  # fmt: skip
    assert [parse_share(text, "x") for text in ("5%", "0.05", ".05")] == [0.05] * 3
    for text in ("", "10 minutes", "-3s"):
        with pytest.raises(UsageError):
            parse_duration(text, "--for")


@pytest.mark.parametrize("change", [{"sites": 0}, {"speed": 0.0}, {"telemetry_s": 0.0}, {"prefix": "Sim"}])
def test_options_outside_their_range_are_refused(change):
    check_options(SimulatorOptions())
    with pytest.raises(UsageError):
        check_options(SimulatorOptions(**change))


def test_release_names():
    found = invent_release("kws@2.1.0#7", counter=2)
    assert (found.label, found.counter) == ("kws@2.1.0", 7)
    assert invent_release("kws@2.1.0", counter=2).manifest == found.manifest
    with pytest.raises(UsageError):
        invent_release("kws", counter=1)


def test_processes_share_every_device_once():
    parts = split(SimulatorOptions(devices=10, first=3, connects_per_s=90.0), 3)
    numbers = [number for part in parts for number in range(part.first, part.first + part.devices)]
    assert numbers == list(range(3, 13))
    assert {part.connects_per_s for part in parts} == {30.0}
