"""The same samples give the same bits, whatever the chunks; and what they give is what a plain reading of the rules says."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DataError
from edgekit.features.compute import compute
from edgekit.features.program import Program
from edgekit.features.stream import StreamWindows
from tests.features.declared import FIGURES, audio, bits, pushed, samples, vibration

chunk_sizes = st.lists(st.integers(1, 97), min_size=1, max_size=6)


@st.composite
def disturbed(draw):
    """A stream with gaps, jitter, disorder, twins, jumps of the clock, NaN and sentinels."""
    count = draw(st.integers(1, 300))
    columns = samples(count, seed=draw(st.integers(0, 9)))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    columns["t"] = columns["t"] + random.normal(size=count) * draw(st.sampled_from([0.0, 0.001, 0.02]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, count - 1))
        columns["t"][at:] += draw(st.sampled_from([0.013, 0.1, 0.77, 3.0, 40.0, -40.0, 1e9]))
    for name in ("ax", "ay"):
        columns[name][random.random(count) < draw(st.sampled_from([0.0, 0.05, 0.7]))] = math.nan
    columns["ay"][random.random(count) < 0.02] = -999
    columns["t"][random.random(count) < draw(st.sampled_from([0.0, 0.02]))] = math.nan
    return columns


@settings(max_examples=120, deadline=None)
@given(
    columns=disturbed(),
    sizes=chunk_sizes,
    fill=st.sampled_from(["none", "hold", "linear", "zero"]),
    late_s=st.sampled_from([0.0, 0.05]),
    hop=st.sampled_from([1, 7, 40, 61]),
)
def test_chunks_do_not_matter(columns, sizes, fill, late_s, hop):
    program = Program(vibration(fill=fill, late_s=late_s, hop=hop, aggregates=FIGURES))
    whole, parts, single = StreamWindows(program), StreamWindows(program), StreamWindows(program)
    expected = bits(pushed(whole, columns, [10**6]))
    assert bits(pushed(parts, columns, sizes)) == expected
    assert bits(pushed(single, columns, [1])) == expected
    assert parts.counters == single.counters == whole.counters


@settings(max_examples=15, deadline=None)
@given(sizes=chunk_sizes)
@pytest.mark.parametrize("declared", [vibration(), audio()], ids=["spectra", "audio"])
def test_batch_and_stream_agree_to_the_last_bit(declared, sizes):
    columns = samples(700) if declared.stream.time else {"pcm": samples(4000)["ax"]}
    table = compute(columns, declared)
    windows = pushed(StreamWindows(Program(declared)), columns, sizes)
    assert len(windows) == len(table) > 3
    for name, batch in table.inputs.items():
        assert np.concatenate([window.inputs[name] for window in windows]).tobytes() == batch.tobytes()
        alone = compute({key: value[: len(value) // 2] for key, value in columns.items()}, declared).inputs[name]
        assert alone.tobytes() == batch[: len(alone)].tobytes(), "a wider table gave other bits"


def plain(columns, program, late, reset):  # noqa: C901 - the rules, one after the other
    """The five rules of the stream module, one sample after the other, with nothing kept but lists."""
    length, hop, rate = program.length, program.hop, program.stream.rate_hz
    counts = {"late": 0, "duplicates": 0, "untimed": 0, "resets": 0, "windows": 0, "incomplete": 0}
    newest, taken, zero, anchor, end, found = None, {}, 0.0, 0, 0, []

    def close():
        row = [taken.get(slot) for slot in range(end - length, end)]
        if all(each is None for each in row):
            return
        values = np.array([[math.nan] * 2 if each is None else each for each in row]).T
        missing = np.isnan(values).sum(axis=1).max()
        counts["incomplete" if missing > 0.5 * length else "windows"] += 1
        if missing <= 0.5 * length:
            found.append((end, values))

    for t, ax, ay in zip(columns["t"], columns["ax"], columns["ay"], strict=True):
        if not math.isfinite(t):
            counts["untimed"] += 1
            continue
        if newest is not None:
            slot = anchor + math.floor((t - zero) * rate + 0.5)
            if abs(slot - newest) > reset:
                counts["resets"] += 1
                counts["incomplete"] += any(slot >= end - length for slot in taken)
                newest = None
        if newest is None:
            zero, anchor = t, math.floor(t * rate + 0.5)
            slot, newest, taken = anchor, anchor - 1, {}
            end = math.ceil((slot - late + 1) / hop) * hop
        while end - 1 + late <= slot and end <= slot:
            close()
            end += hop
        if slot < min(end - length, end - hop):
            counts["late"] += 1
        elif slot >= end - length:
            if slot in taken:
                counts["duplicates"] += 1
            taken.setdefault(slot, [ax, math.nan if ay == -999 else ay])
        newest = max(newest, slot)
        if not late and end - 1 == slot:
            close()
            end += hop
    return found, counts


@settings(max_examples=120, deadline=None)
@given(columns=disturbed(), late_s=st.sampled_from([0.0, 0.05]), hop=st.sampled_from([5, 40, 61]))
def test_rules_hold_sample_by_sample(columns, late_s, hop):
    declared = vibration(fill="none", late_s=late_s, hop=hop, aggregates=("count", "last"), reset_after_s=2.0)
    columns = {name: np.where(array > 1e8, 5000.0, array) if name == "t" else array for name, array in columns.items()}
    program = Program(declared)
    stream = StreamWindows(program)
    windows = stream.push(columns)
    expected, counts = plain(columns, program, round(late_s * 100), 200)
    assert {name: getattr(stream.counters, name) for name in counts} == counts
    assert [window.end_s * 100 for window in windows] == pytest.approx([end for end, _values in expected], abs=0.51, rel=0)
    for window, (_end, values) in zip(windows, expected, strict=True):
        assert window.inputs["x"][0, [0, 2]].tolist() == (~np.isnan(values)).sum(axis=1).tolist()
        assert np.array_equal(window.inputs["raw"][0], np.clip(values.T, -3, 3).astype(np.float32), equal_nan=True)


def test_figures_are_those_of_the_textbook():
    columns = samples(40)
    table = compute({name: columns[name] for name in ("ax", "ay")}, vibration(time="", hop=40))
    program = Program(vibration(time="", hop=40))
    for column in ("ax", "ay"):
        x = columns[column]
        t = np.arange(40) / 100
        expected = {
            "mean": np.mean(x),
            "std": np.std(x),
            "min": np.min(x),
            "max": np.max(x),
            "rms": np.sqrt(np.mean(x**2)),
            "peak_to_peak": np.ptp(x),
            "slope": np.polyfit(t, x, 1)[0],
            "zero_crossings": np.count_nonzero(np.diff(np.signbit(x))),
            "quantile(0.9)": np.quantile(x, 0.9),
            "count": 40,
            "missing": 0,
            "first": x[0],
            "last": x[-1],
            "delta": x[-1] - x[0],
        }
        got = dict(zip(program.names["x"], table.inputs["x"][0], strict=True))
        for name, value in expected.items():
            assert got[f"w.{column}.{name}"] == pytest.approx(value, rel=1e-10), name
        bands = got[f"w.{column}.energy(0,10)"] + got[f"w.{column}.energy(10,50)"]
        assert bands == pytest.approx(np.mean(x**2), rel=1e-12), "Parseval: the bands sum up to the mean square"
    assert np.array_equal(table.inputs["raw"][0], np.stack([columns["ax"], columns["ay"]], 1).clip(-3, 3).astype(np.float32))


def test_energy_finds_the_shaft():
    table = compute({"ax": np.sin(2 * np.pi * 7 * np.arange(100) / 100), "ay": np.zeros(100)},
                    vibration(time="", length=100, hop=100, aggregates=("energy(6, 8)", "energy(8, 50)")))  # fmt: skip
    assert table.inputs["x"][0] == pytest.approx([0.5, 0, 0, 0], abs=1e-12)


def test_log_mel_is_what_it_says():
    pcm = np.sin(2 * np.pi * 300 * np.arange(1000) / 2000)
    mel = compute({"pcm": pcm}, audio()).inputs["mel"][0]
    assert mel.shape == (14, 8)
    assert mel.dtype == np.float32
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 1000 / 700), 10) / 2595) - 1)
    nearest = int(np.abs(edges[1:-1] - 300).argmin())
    assert (mel.argmax(axis=1) == nearest).all()


@pytest.mark.parametrize(
    ("fill", "expected"), [("hold", [1, 1, 1, 4, 4, 6]), ("linear", [1, 2, 3, 4, 5, 6]), ("zero", [1, 0, 0, 4, 0, 6])]
)
def test_missing_samples_are_filled(fill, expected):
    declared = vibration(time="", length=6, hop=6, fill=fill, aggregates=("count", "missing"))
    ax = np.array([1, np.nan, np.nan, 4, np.nan, 6])
    table = compute({"ax": ax, "ay": np.arange(6)}, msgspec.structs.replace(declared, inputs=(
        msgspec.structs.replace(declared.inputs[1], steps=()), declared.inputs[0])))  # fmt: skip
    assert table.inputs["raw"][0, :, 0].tolist() == expected
    assert table.inputs["x"][0].tolist() == [3, 0.5, 6, 0]


def test_gap_in_time_makes_windows_incomplete():
    columns = samples(200)
    keep = np.ones(200, bool)
    keep[50:110] = False
    stream = StreamWindows(Program(vibration(length=40, hop=40, max_missing=0.0)))
    windows = stream.push({name: array[keep] for name, array in columns.items()})
    assert [round(window.end_s * 100) % 1000 for window in windows] == [40, 160, 200]
    assert (stream.counters.windows, stream.counters.incomplete) == (3, 2)


def test_day_without_samples_costs_nothing():
    program = Program(vibration(length=40, hop=1, reset_after_s=1e7))
    stream = StreamWindows(program)
    stream.push(samples(100))
    windows = stream.push(samples(100, start_s=1e6))
    assert len(windows) == 20 + 81, "half-filled ones after the first and before the second hundred"
    assert stream.counters.resets == 0


def test_whole_numbers_of_nanoseconds_stay_exact():
    declared = msgspec.structs.replace(
        vibration(length=10, hop=10), stream=msgspec.structs.replace(vibration().stream, time_unit="ns", rate_hz=1e6)
    )
    declared = msgspec.structs.replace(declared, inputs=declared.inputs[1:])
    columns = samples(40)
    columns["t"] = 1_790_000_000_000_000_000 + np.arange(40) * 1000
    stream = StreamWindows(Program(declared))
    assert len(stream.push(columns)) == 4
    assert stream.counters.duplicates == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ax": None}, "data.missing_input"),
        ({"ax": np.zeros((5, 2))}, "data.shape"),
        ({"ax": np.array(["a"] * 5)}, "data.dtype"),
        ({"ax": np.zeros(4)}, "data.shape"),
    ],
)
def test_samples_that_do_not_fit_are_refused_whole(change, code):
    stream = StreamWindows(Program(vibration()))
    columns = {name: array for name, array in (samples(5) | change).items() if array is not None}
    with pytest.raises(DataError) as caught:
        stream.push(columns)
    assert (caught.value.code, stream.counters.samples) == (code, 0)


def test_old_samples_are_measured_against_the_newest_of_all_chunks():
    program = Program(vibration(reset_after_s=5.0))
    columns = {"t": np.array([100.0, 104.0, 100.5, 98.0, 98.01]), "ax": np.zeros(5), "ay": np.zeros(5)}
    for sizes in ([5], [1], [2, 3]):
        stream = StreamWindows(program)
        pushed(stream, columns, sizes)
        assert (stream.counters.resets, stream.counters.late) == (1, 1), sizes


def test_recordings_are_streams_of_their_own():
    columns = samples(160)
    groups = np.repeat(["a", "b"], 80)
    table = compute(columns, vibration(length=40, hop=40), labels=np.repeat([0, 1, 1, 2], 40), groups=groups)
    second = compute({name: array[80:] for name, array in columns.items()}, vibration(length=40, hop=40))
    assert table.groups.tolist() == ["a", "a", "b", "b"]
    assert table.labels.tolist() == [0, 1, 1, 2]
    assert table.inputs["x"][2:].tobytes() == second.inputs["x"].tobytes()
    assert compute(columns, vibration(length=40, hop=20, max_missing=0), labels=np.repeat([0, 1], 80)).mixed_labels == 1


def test_no_window_is_an_error_that_says_why():
    with pytest.raises(DataError) as caught:
        compute(samples(10), vibration())
    assert caught.value.code == "data.empty"
    assert "10 samples make no window" in caught.value.message
