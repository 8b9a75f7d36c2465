"""The report's sections about the search: figures, folds, escaping, and nothing where nothing was learned."""

from __future__ import annotations

import msgspec
import pytest
from test_report import base, good, outcome

from edgekit.compiler.findings import (
    AuditFinding,
    Findings,
    Kernel,
    LadderStep,
    LayerSaturation,
    LayerSensitivity,
    RuntimeAudit,
    TensorRange,
)
from edgekit.compiler.report_page import render_page
from edgekit.compiler.report_search import audits, ladder, layers, ranges, saturation


@pytest.fixture
def result():
    return outcome(base(), good())


def filled(result):
    many = tuple(
        LayerSensitivity(
            layer=f"layer_{i}", op_type="Conv", enable_one_db=20.0 + i, weights_only_db=30.0, float_ms=0.5, int8_ms=0.25
        )
        for i in range(25)
    )
    hostile = LayerSensitivity(layer="<script>alert(1)</script>", op_type="Conv", enable_one_db=12.34, is_int8=False)
    found = Findings(
        layers=(hostile, *many),
        ranges=(
            TensorRange(tensor="act", seen_low=-1, seen_high=9, low=-1, high=4, method="mse", sqnr_db=33.3, clipped=0.0125),
        ),
        saturation=(LayerSaturation(layer="conv_7", op_type="Conv", pairs=1000, overflowing=25, worst=40_000, cure="7-bit"),),
        audits={
            "int8": RuntimeAudit(
                model="model.onnx",
                kernels=(Kernel(node="a", op_type="QLinearConv", domain="", precision="int8", ms=0.75),),
                findings=(
                    AuditFinding(kind="float-island", node="b", op_type="Conv", text="b runs in float32", repair="mend it"),
                ),
                total_ms=1.0,
            )
        },
        ladder=(LadderStep(name="feedback", is_kept=True, reason="+1.20 dB", before_db=30.0, score_db=31.2, seconds=2.0),),
    )
    return msgspec.structs.replace(result, findings=found)


def test_sections_stand_in_the_page_with_their_figures(result):
    page = render_page(filled(result)).replace("\u00a0", " ")
    for words in (
        "12.3 dB",
        "31.2 dB",
        "25 of 1,000",
        "7-bit weights",
        "1.25 %",
        "b runs in float32. mend it",
        "QLinearConv",
        "75 %",
    ):
        assert words in page, words


def test_names_of_layers_are_escaped(result):
    assert "<script>" not in render_page(filled(result))


def test_the_rest_of_long_tables_is_folded(result):
    shown = layers(filled(result))
    assert "6 more" in shown
    assert shown.index("layer_18") < shown.index("<details>") < shown.index("layer_19")


def test_nothing_learned_shows_nothing(result):
    empty = msgspec.structs.replace(result, findings=Findings())
    assert [part(empty) for part in (layers, ladder, ranges, saturation, audits)] == [None] * 5
    assert "The ladder" not in render_page(empty)


def test_no_overflow_is_said_in_words(result):
    calm = Findings(saturation=(LayerSaturation(layer="a", op_type="Conv", pairs=10, overflowing=0, worst=10),))
    assert "No pair of products leaves int16" in saturation(msgspec.structs.replace(result, findings=calm))
