"""The sections about ranges, saturation, the runtime's graph and the ladder; contents, folds, and noise in words."""

from __future__ import annotations

import re

import msgspec
import pytest
from test_report import base, candidate, evaluation, good, outcome, timing
from test_report_layers import of, one_plot, plain, rows_of

from edgekit.compiler.findings import (
    AuditFinding,
    Findings,
    Kernel,
    LadderStep,
    LayerSaturation,
    RuntimeAudit,
    TensorRange,
)
from edgekit.compiler.plot import Axis, Limit, Point, scatter
from edgekit.compiler.report_audit import audits
from edgekit.compiler.report_details import lineage
from edgekit.compiler.report_figures import SHOWN
from edgekit.compiler.report_ladder import ladder, remarks
from edgekit.compiler.report_layers import costs, sensitivity
from edgekit.compiler.report_operators import savings
from edgekit.compiler.report_page import render_page
from edgekit.compiler.report_ranges import ranges
from edgekit.compiler.report_saturation import saturation
from edgekit.compiler.report_table import SHOWN_ROWS
from edgekit.compiler.report_words import change_words, headline
from edgekit.schema.candidate import PassStep

HOSTILE = "<script>alert(1)</script>"


def test_nothing_learned_shows_nothing():
    empty = of()
    sections = (sensitivity, costs, savings, ranges, saturation, audits, ladder, remarks)
    assert [part(empty) for part in sections] == [None] * len(sections)
    page = render_page(empty)
    assert not set(re.findall(r'<section id="([\w-]+)"', page)) & {"sensitivity", "ladder", "ranges", "savings", "audit"}
    assert 'href="#ladder"' not in page


# --- ranges ------------------------------------------------------------------------------------------------------------------


def tensor(name: str, sqnr: float = 30.0, **fields) -> TensorRange:
    known = {"seen_low": -1.0, "seen_high": 9.0, "low": -1.0, "high": 4.0, "method": "mse", "clipped": 0.0125, **fields}
    return TensorRange(tensor=name, sqnr_db=sqnr, **known)


def test_ranges_show_seen_and_chosen():
    shown = ranges(of(ranges=(tensor("act", 33.33),)))
    assert rows_of(shown) == [["act", "\u22121.00 \u2026 9.00", "\u22121.00 \u2026 4.00", "mse", "33.3 dB", "1.25 %"]]
    assert "1 of 1 ranges clip values" in plain(shown)
    assert "mse, 33.3 dB, clips 1.25 %" in one_plot(shown).replace("\u00a0", " ")


def test_chosen_range_lies_where_it_lies_in_the_seen_one():
    plot = one_plot(ranges(of(ranges=(tensor("act", seen_low=0.0, seen_high=10.0, low=2.0, high=7.0),))))
    bars = {
        name: (float(x), float(width))
        for x, width, name in re.findall(r'<rect x="([\d.]+)"[^>]*? width="([\d.]+)"[^>]*class="(\w+)"', plot)
    }
    (start, whole), (low, part) = bars["seen"], bars["length"]
    assert (low - start) / whole == pytest.approx(0.2, abs=0.01)
    assert part / whole == pytest.approx(0.5, abs=0.01)


def test_worst_ranges_are_drawn_first_and_all_are_in_the_table():
    shown = ranges(of(ranges=tuple(tensor(f"t{index:02}", 100.0 - index) for index in range(SHOWN + 3))))
    assert re.findall(r">(t\d+)</text>", one_plot(shown)) == [f"t{index:02}" for index in range(SHOWN + 2, 2, -1)]
    assert len(rows_of(shown)) == SHOWN + 3


def test_range_without_width_is_in_the_table_only():
    shown = ranges(of(ranges=(tensor("flat", seen_low=2.0, seen_high=2.0), tensor("act"))))
    assert ">flat</text>" not in shown
    assert len(rows_of(shown)) == 2


# --- saturation --------------------------------------------------------------------------------------------------------------


def test_saturation_by_layer():
    layers = (
        LayerSaturation(layer="a", op_type="Conv", pairs=1000, overflowing=25, worst=40_000, cure="7-bit"),
        LayerSaturation(layer="b", op_type="Conv", pairs=1000, overflowing=50, worst=-50_000),
        LayerSaturation(layer="c", op_type="Conv", pairs=1000, overflowing=0, worst=10),
    )
    shown = saturation(of(saturation=layers))
    assert rows_of(shown) == [
        ["b Conv", "50 of 1,000", "5.00 %", "\u221250,000", "none"],
        ["a Conv", "25 of 1,000", "2.50 %", "40,000", "7-bit weights"],
    ]
    words = plain(shown)
    assert "2 of 3 layers would overflow on calibration data, by sums of up to 50,000 where 32,767 fits. 1 of them" in words
    assert re.findall(r'class="plain (\w+)"', one_plot(shown)) == ["none", "cured"]


def test_no_overflow_is_said_in_words():
    calm = LayerSaturation(layer="a", op_type="Conv", pairs=10, overflowing=0, worst=10)
    shown = saturation(of(saturation=(calm,)))
    assert "Nothing overflows in any of 1 layers" in shown
    assert "<svg" not in shown


# --- what the runtime really runs --------------------------------------------------------------------------------------------


def kernel(op_type: str, precision: str, ms: float | None = None) -> Kernel:
    return Kernel(node=op_type, op_type=op_type, domain="", precision=precision, ms=ms)


def audit(*findings: AuditFinding, kernels: tuple[Kernel, ...] = (), **fields):
    return of(audits={"int8": RuntimeAudit(model="model.onnx", kernels=kernels, findings=findings, **fields)})


def island(index: int, repair: str = "mend it") -> AuditFinding:
    return AuditFinding(kind="float-island", node=f"n{index}", op_type="Conv", text=f"n{index} is float", repair=repair, ms=0.5)


def test_audit_shows_operators_by_precision():
    kernels = (kernel("QLinearConv", "int8", 0.5), kernel("QLinearConv", "int8", 0.25), kernel("Cast", "conversion", 0.25))
    shown = audits(audit(kernels=kernels, total_ms=1.0))
    assert rows_of(shown) == [["QLinearConv", "int8", "2", "0.750", "75 %"], ["Cast", "conversions", "1", "0.250", "25 %"]]
    assert "75 %, 0.750 ms, 2 nodes" in one_plot(shown).replace("\u00a0", " ")
    assert "model.onnx, 3 nodes, 1.00 ms a run" in plain(shown)


def test_audit_without_times_counts_nodes():
    shown = audits(audit(kernels=(kernel("QLinearConv", "int8"), kernel("Conv", "fp32"))))
    assert rows_of(shown)[0] == ["QLinearConv", "int8", "1", "\u2014", "\u2014"]
    assert ">1 node</text>" in one_plot(shown)


def test_audit_without_findings_claims_no_more_than_it_knows():
    assert "what was quantized runs in integers" in audits(audit(kernels=(kernel("QLinearConv", "int8"),)))
    floats = audits(audit(kernels=(kernel("Conv", "fp32"),)))
    assert "nothing in it runs in int8" in floats
    assert "runs in integers" not in floats


def test_finding_is_told_with_its_repair():
    assert "Float island (0.500 ms): n1 is float. Mend it." in plain(audits(audit(island(1))))
    assert plain(audits(audit(island(1, repair="")))).endswith("n1 is float.")


def test_findings_with_one_repair_are_told_together_and_folded():
    shown = audits(audit(*(island(index) for index in range(5)), island(9, repair="another")))
    words = plain(shown)
    assert "Float island, 5 times (2.50 ms) Repair: mend it" in words
    assert "n9 is float. Another." in words
    assert words.count("mend it") == 1
    assert shown.index("n2 is float") < shown.index("<summary>2 more") < shown.index("n3 is float")


# --- the ladder --------------------------------------------------------------------------------------------------------------


def test_ladder_is_an_ablation_table():
    steps = (
        LadderStep(name="feedback", is_kept=True, reason="+1.20 dB", before_db=30.0, score_db=31.2, seconds=2.0),
        LadderStep(name="bias", is_kept=False, reason="-0.50 dB", before_db=31.2, score_db=30.7, seconds=0.25),
        LadderStep(name="scales", is_kept=False, reason="no time left"),
        LadderStep(name="equalize-channels(strength=0.5)", is_kept=False, reason="no time left"),
    )
    shown = ladder(of(ladder=steps))
    assert rows_of(shown) == [
        ["feedback rounding with error feedback", "30.0 dB", "31.2 dB", "+1.2", "2.0", "\u2713 kept +1.20 dB"],
        ["bias biases corrected", "31.2 dB", "30.7 dB", "\u22120.50", "0.25", "\u2717 not kept \u22120.50 dB"],
        ["scales weights clipped where that is nearer, by channel", *["\u2014"] * 3, "0", "\u2717 not kept no time left"],
        [
            "equalize-channels channels of neighbouring layers balanced; strength=0.5",
            *["\u2014"] * 3,
            "0",
            "\u2717 not kept no time left",
        ],
    ]
    assert "1 of 4 steps stayed, +1.2 dB together." in plain(shown)


def test_remarks_are_sentences():
    assert plain(remarks(of(notes=("bias was left out: 5 s were left.",)))) == "Bias was left out: 5 s were left."


def test_names_are_escaped():
    found = Findings(
        ranges=(tensor(HOSTILE, method=HOSTILE),),
        saturation=(LayerSaturation(layer=HOSTILE, op_type=HOSTILE, pairs=2, overflowing=1, worst=40_000, cure=HOSTILE),),
        audits={HOSTILE: RuntimeAudit(model=HOSTILE, kernels=(kernel(HOSTILE, "int8"),), findings=(island(1, HOSTILE),))},
        ladder=(LadderStep(name=HOSTILE, is_kept=True, reason=HOSTILE),),
        notes=(HOSTILE,),
    )
    page = render_page(msgspec.structs.replace(of(), findings=found))
    assert "<script>" not in page
    assert page.count("alert(1)") >= 8


# --- the page ----------------------------------------------------------------------------------------------------------------


def test_contents_name_every_section():
    page = render_page(of(ladder=(LadderStep(name="bias", is_kept=True, reason=""),), notes=("n",)))
    contents = page.split("<nav")[1].split("</nav>", maxsplit=1)[0]
    links = re.findall(r'href="#([\w-]+)">([^<]*)<', contents)
    sections = re.findall(r'<section id="([\w-]+)"[^>]*><h2[^>]*>([^<]*)<', page)
    assert links == sections
    assert ("ladder", "The ladder") in links


def test_more_candidates_are_folded():
    others = [candidate(f"c{index}", evaluation=evaluation(), latency=timing(3.0 + index)) for index in range(SHOWN_ROWS)]
    shown = render_page(outcome(base(), good(), *others)).split('id="candidates"')[1].split("</section>")[0]
    assert shown.index("c5</span>") < shown.index("<summary>2 more candidates") < shown.index("c6</span>")
    few = render_page(outcome(base(), good(), *others[: SHOWN_ROWS - 2])).split('id="candidates"')[1].split("</section>")[0]
    assert "<details>" not in few


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('["' + '", "'.join(f"node_{index}" for index in range(20)) + '"]', "floats: 20 entries"),
        ("x" * 200, "floats: 200 characters"),
        ("short", None),
    ],
)
def test_long_settings_are_folded(value, words):
    step = PassStep(name="p", settings={"floats": value}, parent=None, output="x", seconds=0.0, versions={})
    shown = lineage(outcome(base(), msgspec.structs.replace(good(), lineage=(step,))))
    assert ("<details>" in shown) == (words is not None)
    assert (words or "floats = short") in plain(shown)


def test_band_of_ties_leaves_out_names_and_notes_on_a_phone():
    bands = re.findall(r'<path d="([^"]*)" class="band"', render_page(outcome(base(), good())))
    assert [band.count("z") for band in bands] == [1, 1, 2]


# --- noise -------------------------------------------------------------------------------------------------------------------


def noisy(value: float, low: float = 0.0, high: float = 0.0):
    drop = 200.0 - value
    fields = {"value": value, "baseline": 200.0, "drop_low": drop + low, "drop_high": drop + high, "per_class": {}}
    return evaluation(drop, metric="sqnr_db", **fields)


def test_noise_is_told_as_it_is_and_not_against_a_baseline_without_any():
    result = outcome(base(evaluation=noisy(200.0)), good(evaluation=noisy(24.25, -0.5, 0.5)))
    assert headline(result).endswith("at 24.25\u00a0dB of signal to quantization noise.")
    words = plain(render_page(result))
    assert "24.25 dB of its answers against fp32 95 % interval 23.8 dB to 24.8 dB fp32: no noise" in words
    assert 'data-label="change"' not in render_page(result)
    assert "\u2212175" not in words
    assert "\u2212176" not in words
    assert change_words(result.chosen.evaluation).replace("\u00a0", " ") == "95 % interval 23.8 dB to 24.8 dB"


def test_next_to_no_noise_does_not_squash_the_plot():
    result = outcome(base(evaluation=noisy(200.0)), good(evaluation=noisy(24.0)))
    shown = render_page(result)
    assert shown.count("More than 80\u00a0dB is drawn as 80\u00a0dB.") == 2
    ticks = re.findall(r'class="tick" text-anchor="end">([\d.]+)<', one_plot(shown))
    assert max(float(tick) for tick in ticks) <= 90
    loud = outcome(base(evaluation=noisy(60.0)), good(evaluation=noisy(24.0)))
    assert "is drawn as" not in render_page(loud)


@pytest.mark.parametrize(("x", "anchor"), [(0.0, "end"), (10.0, "start")])
def test_words_of_a_limit_stand_where_fewer_symbols_are(x, anchor):
    places = [(x, 0.995), (5.0, 0.2)]
    points = [
        Point(name=f"p{index}", x=at, y=y, shape="circle", kind="passed", title="", rank=2)
        for index, (at, y) in enumerate([*places, (10.0 - x, 0.1)])
    ]
    limit = Limit(value=0.999, is_upper=False, label="limit")
    across = Axis(title="x", format_tick=lambda value, _step: f"{value:g}", is_lower_better=True)
    up = Axis(title="y", format_tick=lambda value, _step: f"{value:g}", is_lower_better=False, limits=(limit,))
    svg = scatter(points, across, up, width=600, height=400, label="")
    assert re.search(r'class="limit-label" text-anchor="(\w+)">limit<', svg)[1] == anchor
