"""Merged windows: they say of the whole time exactly what their parts said, in whatever order they were merged."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.agent.link import Figures
from edgekit.agent.merging import count_of, join_ranges, merge_payloads, merge_windows
from edgekit.agent.windows import METRICS, SCHEMA, model_windows, read_quantiles
from edgekit.counts import decode_counts, encode_counts
from edgekit.schema.message import ModelWindow, Window
from edgekit.telemetry.codec import pack_values, unpack_values
from edgekit.telemetry.histogram import LatencyHistogram

NAMES = [spec.name for spec in METRICS]
COUNTS = [spec.name for spec in METRICS if spec.kind == "count"]


def sketch(values):
    bins = LatencyHistogram()
    for value in values:
        bins.add(value)
    return bins.encode()


def make_window(seq, latencies, *, digest="a" * 12, bins=(1, 0, 2), **values):
    sketches = (sketch(latencies), sketch([value / 2 for value in latencies]))
    known = {"requests": len(latencies), "samples": len(latencies), "uptime_s": seq, "rss_mb": 50 + seq, "cpu_percent": seq}
    known |= read_quantiles(sketches) | values
    model = ModelWindow(
        model_digest=digest,
        requests=len(latencies),
        sketched=sum(bins),
        sketches=(encode_counts(bins),),
        verdicts={"clip x": seq},
    )
    return Window(
        seq=seq,
        start_ms=seq * 1000,
        duration_ms=1000,
        values=pack_values([float(known.get(name, 0.0)) for name in NAMES]),
        model_digest=digest,
        sketches=sketches,
        models=(model,) if latencies else (),
    )


def values_of(window):
    return dict(zip(NAMES, unpack_values(window.values), strict=True))


windows = st.lists(
    st.builds(
        lambda latencies, digest, bins: (latencies, digest, bins),
        st.lists(st.floats(0.1, 1e4), max_size=6),
        st.sampled_from(["a" * 12, "b" * 12]),
        st.lists(st.integers(0, 500), min_size=1, max_size=8),
    ),
    min_size=2,
    max_size=9,
)


def exact(window):
    """What must not depend on the order of merging."""
    values = values_of(window)
    models = {
        model.model_digest: (model.requests, model.sketched, model.sketches, model.verdicts, model.latency)
        for model in window.models
    }
    quantiles = [round(values[name], 4) for name in ("latency_p50_ms", "latency_p99_ms") if math.isfinite(values[name])]
    return (
        {name: values[name] for name in COUNTS},
        window.sketches,
        models,
        quantiles,
        (window.start_ms, window.duration_ms, window.merged),
    )


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(1, 8))
def test_merging_is_associative_and_adds_up(parts, cut):
    made = [make_window(seq, *part[:1], digest=part[1], bins=part[2]) for seq, part in enumerate(parts, 1)]
    whole = merge_windows(made)
    cut = min(cut, len(made) - 1)
    in_steps = merge_windows([merge_windows(made[:cut]), merge_windows(made[cut:])])
    assert exact(in_steps) == exact(whole)
    latencies = [value for part in parts for value in part[0]]
    assert values_of(whole)["requests"] == len(latencies)
    assert LatencyHistogram.decode(whole.sketches[0]) == LatencyHistogram.decode(sketch(latencies))
    assert whole.merged == (1, len(made))
    assert whole.seq == len(made)
    for model in whole.models:
        mine = [part for part in parts if part[1] == model.model_digest and part[0]]
        assert model.requests == sum(len(part[0]) for part in mine)
        total = decode_counts(model.sketches[0], cells=8)
        assert sum(total) == sum(sum(part[2]) for part in mine)
        if len(whole.models) > 1:
            assert LatencyHistogram.decode(model.latency).count == model.requests


def test_gauges_keep_what_matters():
    made = [make_window(seq, [1.0] * seq) for seq in (1, 2, 3)]
    values = values_of(merge_windows(made))
    assert values["cpu_percent"] == 2.0
    assert (values["rss_mb"], values["uptime_s"]) == (53.0, 3.0)
    nothing = [make_window(seq, [], confidence_mean=math.nan) for seq in (1, 2)]
    assert math.isnan(values_of(merge_windows(nothing))["confidence_mean"])
    assert math.isnan(values_of(merge_windows(nothing))["latency_p50_ms"])


def test_ranges_join_and_count():
    assert join_ranges([(1, 3), (7, 7), (4, 5)]) == (1, 5, 7, 7)
    assert count_of((1, 5, 7, 7)) == 6


@pytest.mark.parametrize("case", ["schema", "garbage", "values"])
def test_what_cannot_be_merged_is_left_alone(case):
    good = [msgspec.msgpack.encode(make_window(seq, [1.0])) for seq in (1, 2)]
    if case == "garbage":
        good[1] = b"\xc1"
    if case == "values":
        good[1] = msgspec.msgpack.encode(msgspec.structs.replace(make_window(2, [1.0]), values=b"1234"))
    assert merge_payloads(good, 5 if case == "schema" else SCHEMA) is None


def test_two_workers_of_one_model_are_one_row_and_two_models_two():
    one = Figures(
        model_digest="sha256:" + "a" * 64, requests=2, latency=sketch([1, 2]), sketches=(b"\x01",), labelled=1, right=1
    )
    other = Figures(model_digest="sha256:" + "b" * 64, requests=1, latency=sketch([9]))
    idle = Figures(model_digest="sha256:" + "c" * 64)
    (row,) = model_windows([one, one, idle])
    assert (row.model_digest, row.requests, row.sketches, row.labelled, row.right, row.latency) == (
        "a" * 12,
        4,
        (b"\x02",),
        2,
        2,
        b"",
    )
    rows = model_windows([one, other])
    assert [LatencyHistogram.decode(row.latency).count for row in rows] == [2, 1]
