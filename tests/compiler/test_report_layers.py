"""The sections about layers and operators: figures of the records, waterfalls that add up, folds with everything, escaping."""

from __future__ import annotations

import re

import msgspec
import pytest
from test_report import base, good, outcome

from edgekit.compiler.findings import Findings, Kernel, LayerSensitivity, RuntimeAudit
from edgekit.compiler.report_figures import SHOWN
from edgekit.compiler.report_layers import STEPS, costs, sensitivity
from edgekit.compiler.report_operators import kind_of, savings
from edgekit.compiler.report_page import render_page
from edgekit.compiler.report_waterfall import Step, Total, falls
from edgekit.schema.candidate import PassStep

HOSTILE = "<script>alert(1)</script>"


def layer(name: str, enable: float = 30.0, **fields) -> LayerSensitivity:
    return LayerSensitivity(layer=name, op_type="Conv", enable_one_db=enable, **fields)


def of(*layers: LayerSensitivity, chosen=None, **parts):
    return msgspec.structs.replace(outcome(base(), chosen or good()), findings=Findings(layers=layers, **parts))


def plain(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", markup).replace("\u00a0", " ")).strip()


def rows_of(markup: str) -> list[list[str]]:
    """Cells of the table's body, as text."""
    body = markup.split("<tbody")[1]
    return [[plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in body.split("<tr")[1:]]


def one_plot(markup: str) -> str:
    """The wide picture of three."""
    return markup.split('class="plot wide"')[1].split("</svg>", maxsplit=1)[0]


# --- where int8 hurts --------------------------------------------------------------------------------------------------------


def test_sensitivity_has_all_four_measurements_and_both_times():
    item = layer(
        "conv_1", 12.34, weights_only_db=20.5, activations_only_db=15.25, disable_one_db=28.75, float_ms=0.5, int8_ms=0.125
    )
    assert rows_of(sensitivity(of(item))) == [
        ["conv_1 Conv", "12.3 dB", "20.5 dB", "15.2 dB", "28.8 dB", "int8", "0.500", "0.125"]
    ]


def test_sensitivity_without_disable_one_has_no_column_for_it():
    shown = sensitivity(of(layer("a", 10.0), layer("b", 20.0)))
    assert "all but it" not in shown
    assert "A cross" not in shown
    assert "everything but this layer" not in shown
    assert len(rows_of(shown)[0]) == 7


def test_disable_one_of_a_single_layer_is_marked_and_explained():
    shown = sensitivity(of(layer("a", 10.0, disable_one_db=5.0), layer("b", 20.0)))
    assert "A cross is the other way round" in shown
    assert one_plot(shown).count('<path d="M') > one_plot(sensitivity(of(layer("a", 10.0), layer("b", 20.0)))).count(
        '<path d="M'
    )
    assert [row[4] for row in rows_of(shown)] == ["5.0 dB", "\u2014"]


def test_most_sensitive_layers_are_drawn_and_all_are_in_the_table():
    many = [layer(f"layer_{index:03}", 100.0 - index) for index in range(SHOWN + 5)]
    shown = sensitivity(of(*many))
    drawn = re.findall(r">(layer_\d+)</text>", one_plot(shown))
    assert drawn == [f"layer_{index:03}" for index in range(SHOWN + 4, 4, -1)]
    assert len(rows_of(shown)) == SHOWN + 5
    assert f"Drawn are the {SHOWN} most sensitive." in plain(shown)


def test_float_layers_look_different_and_are_counted():
    shown = sensitivity(of(layer("a", is_int8=False), layer("b"), layer("c")))
    assert "1 of 3 layers stay in float32 in int8" in plain(shown)
    assert one_plot(shown).count('class="hurt fp32"') == 1
    assert one_plot(shown).count('class="hurt int8"') == 2


@pytest.mark.parametrize(("weights", "is_cut"), [(21.0, False), (30.0, False), (31.0, False), (40.0, True), (90.0, True)])
def test_arrow_of_a_far_mark_is_explained_where_it_is_drawn(weights, is_cut):
    shown = sensitivity(of(layer("a", 20.0, weights_only_db=weights)))
    assert ("An arrow" in shown) == is_cut
    assert ('class="cut"' in shown) == is_cut


def test_layer_whose_figures_are_unknown_is_in_the_table_only():
    shown = sensitivity(of(layer("known", 10.0), layer("unknown", float("nan"))))
    assert ">unknown</text>" not in shown
    assert [row[:2] for row in rows_of(shown)] == [["known Conv", "10.0 dB"], ["unknown Conv", "\u2014"]]


def test_figures_of_the_mix_are_not_said_to_be_of_another_candidate():
    mixed = msgspec.structs.replace(
        good(),
        name="mix",
        verdict=msgspec.structs.replace(good().verdict, status="passed"),
        lineage=(PassStep(name="quantize-planned", settings={}, parent=None, output="x", seconds=0.0, versions={}),),
    )
    result = msgspec.structs.replace(outcome(base(), good(), mixed), findings=Findings(layers=(layer("a"),)))
    assert "All this is of mix; int8 was chosen." in plain(sensitivity(result))
    assert "All this is of" not in plain(sensitivity(of(layer("a"))))


def test_names_of_layers_are_escaped():
    page = render_page(of(layer(HOSTILE, float_ms=1.0, int8_ms=0.5)))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# --- what each layer costs ---------------------------------------------------------------------------------------------------


def test_costs_go_from_float_to_the_mix():
    kept = layer("c", is_int8=False, float_ms=2.0, int8_ms=1.0)
    changed = [layer("a", float_ms=1.0, int8_ms=0.25), layer("b", float_ms=0.5, int8_ms=0.75)]
    shown = plain(costs(of(*changed, kept, layer("d"))))
    assert "3.50 ms in float32, 3.00 ms in int8 (\u221214 %)" in shown
    assert "Kept in float32: 1 layer, 2.00 ms either way." in shown
    assert "Not timed: 1 layer." in shown
    assert "\u22120.750 ms" in shown
    assert "+0.250 ms" in shown


def test_cost_table_shows_what_int8_would_bring_to_layers_that_stay_float():
    rows = rows_of(costs(of(layer("a", float_ms=1.0, int8_ms=0.25), layer("c", is_int8=False, float_ms=2.0, int8_ms=1.0))))
    assert rows[1] == ["c Conv", "2.00", "1.00", "\u22121.00", "fp32", "\u00b10"]


def test_costs_without_times_or_int8():
    assert costs(of(layer("a"))) is None
    shown = plain(costs(of(layer("a", is_int8=False, float_ms=1.0, int8_ms=0.5))))
    assert "runs no layer in int8; in float32 they take 1.00 ms together" in shown


# --- waterfalls --------------------------------------------------------------------------------------------------------------


def steps_of(*changes: float) -> list[Step]:
    return [Step(name=f"s{index}", change_ms=change, words="", title="t") for index, change in enumerate(changes)]


def fall(changes, most=3, least_ms=0.0):
    first = Total(name="from", ms=10.0, title="from")
    return falls(first, steps_of(*changes), Total(name="to", ms=10 + sum(changes), title="to"), most=most, least_ms=least_ms)


def test_waterfall_begins_and_ends_at_its_totals_and_every_step_hangs_on_the_one_before():
    rows = fall((-1.0, 0.5, -3.0, 0.25, -0.125, 0.0))
    assert [row.name for row in rows] == ["from", "s2", "s0", "s1", "all others (2)", "to"]
    assert [row.kind for row in rows] == ["total", "saves", "saves", "costs", "costs", "total"]
    assert [row.start for row in rows[1:-1]] == [row.end for row in rows[:-2]]
    assert rows[-2].end == pytest.approx(rows[-1].end)


def test_steps_of_a_waterfall_stand_on_no_line_on_a_phone():
    shown = costs(of(layer("a", float_ms=1.0, int8_ms=0.5), layer("b", float_ms=1.0, int8_ms=0.5)))
    narrow = shown.split('class="plot narrow"')[1]
    line = re.search(r'<path d="([^"]*)" class="axis"', narrow)[1]
    assert line.count("M") == 2  # the two totals


def test_single_step_is_never_called_all_others():
    assert [row.name for row in fall((-1.0, -2.0, -3.0, -4.0))] == ["from", "s3", "s2", "s1", "s0", "to"]


def test_small_steps_are_drawn_together():
    assert [row.name for row in fall((-3.0, -0.01, -0.02), least_ms=0.1)] == ["from", "s0", "all others (2)", "to"]


def test_waterfall_of_many_layers_has_one_step_for_the_rest():
    shown = costs(of(*(layer(f"n{index}", float_ms=1.0 + index, int8_ms=0.5) for index in range(STEPS + 6))))
    assert one_plot(shown).count('class="fall saves"') == STEPS + 1
    assert "all others (6)" in shown


# --- operators ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "kind"),
    [
        ("Conv", "Conv"), ("FusedConv", "Conv"), ("NhwcFusedConv", "Conv"), ("QLinearConv", "Conv"), ("ConvInteger", "Conv"),
        ("QGemm", "MatMul, Gemm"), ("DynamicQuantizeMatMul", "MatMul, Gemm"), ("MatMulIntegerToFloat", "MatMul, Gemm"),
        ("SkipLayerNormalization", "LayerNormalization"), ("BiasGelu", "Gelu"), ("QuickGelu", "QuickGelu"), ("Q", "Q"),
    ],
)  # fmt: skip
def test_kind_of_operator_is_the_same_in_every_precision(op_type, kind):
    assert kind_of(op_type) == kind


def kernel(op_type: str, precision="fp32", ms: float | None = 1.0) -> Kernel:
    return Kernel(node=f"n_{op_type}", op_type=op_type, domain="", precision=precision, ms=ms)


def audited(before, after, **changes):
    audits = {
        name: RuntimeAudit(model="m.onnx", kernels=tuple(kernels), findings=())
        for name, kernels in {"fp32": before, "int8": after}.items()
        if kernels is not None
    }
    return of(audits=audits, **changes)


def test_time_saved_by_kind_of_operator():
    shown = savings(
        audited(
            [kernel("Conv", ms=4.0), kernel("FusedConv", ms=2.0), kernel("Softmax", ms=0.5)],
            [kernel("QLinearConv", "int8", 2.5), kernel("QuantizeLinear", "conversion", 0.25), kernel("Softmax", ms=0.5)],
        )
    )
    words = plain(shown)
    assert "6.50 ms in the operators of fp32, 3.25 ms in those of int8 (\u221250 %)" in words
    assert "the medians without it are 2.00 ms and 1.00 ms" in words
    assert rows_of(shown) == [
        ["Conv", "1 Conv, 1 FusedConv", "6.00", "1 QLinearConv", "2.50", "\u22123.50"],
        ["Softmax", "1 Softmax", "0.500", "1 Softmax", "0.500", "\u00b10"],
        ["conversions", "\u2014", "\u2014", "1 QuantizeLinear", "0.250", "+0.250"],
    ]
    assert re.findall(r'class="fall (\w+)"', one_plot(shown)) == ["total", "saves", "costs", "total"]


def test_time_saved_is_not_told_without_both_profiles():
    timed, untimed = [kernel("Conv")], [kernel("Conv", ms=None)]
    assert savings(audited(timed, timed)) is not None
    assert savings(audited(timed, None)) is None
    assert savings(audited(timed, untimed)) is None
    assert savings(audited(untimed, timed)) is None
    baseline = msgspec.structs.replace(base(), verdict=msgspec.structs.replace(base().verdict, status="chosen"))
    alone = msgspec.structs.replace(outcome(baseline), findings=audited(timed, None).findings)
    assert savings(alone) is None


def test_names_of_operators_are_escaped():
    page = render_page(audited([kernel("Conv")], [kernel(HOSTILE, ms=0.5)]))
    assert "<script>" not in page
    assert 'id="savings"' in page
