"""The report: everything that a run can hold is shown, nothing that it holds can become markup, and claims follow intervals."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.compiler.markup import element
from edgekit.compiler.plot import CHARACTER_PX, Axis, Limit, Point, find_front, nice_ticks, scatter, shorten, span
from edgekit.compiler.report import write_report
from edgekit.compiler.report_page import render_page
from edgekit.compiler.report_words import change_words, headline, is_tie, significant, speed, typeset
from edgekit.compiler.result import DataDescription, OpLatency, OptimizeResult, RequestSummary
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import BudgetCheck, Candidate, PassStep, SourceModel, Status, Verdict
from edgekit.schema.contract import Contract
from edgekit.schema.digest import digest_bytes
from edgekit.schema.measurement import EvalReport, HostFingerprint, LatencyReport
from edgekit.schema.target import Int8Rules, TargetProfile

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='a()'>&amp;\x00\u202e{{x}}"
DIGEST = digest_bytes(b"x")
HOST = HostFingerprint(
    arch="x86-64", cpu="cpu", isa=("avx2",), cores=2, ram_mb=4e3, os="Linux", python="3.11", runtime="ort", runtime_version="1"
)
TARGET = TargetProfile(
    name="board", title="Board", arch="aarch64", cpu="a76", isa=("dotprod",), cores=4, ram_mb=4e3, runtime="onnxruntime",
    int8=Int8Rules(), channel_multiple=8, sources={},
)  # fmt: skip
INF, NAN = float("inf"), float("nan")
VOID = {"meta", "br", "hr", "col"}


def evaluation(drop=0.002, low=-0.001, high=0.005, **changes):
    report = EvalReport(
        metric="top1", value=0.9 - drop, baseline=0.9, drop=drop, is_higher_better=True, samples=1000, data=DIGEST,
        isa=("avx2",),
        drop_low=low, drop_high=high, per_class={"0": 0.9, "1": 0.9 - 2 * drop},
    )  # fmt: skip
    return msgspec.structs.replace(report, **changes)


def timing(p50=1.0, ratio=0.5, **changes):
    report = LatencyReport(
        host=HOST, is_on_target=True, threads=1, warmup_runs=3, runs=100, p50_ms=p50, p90_ms=p50 * 1.2, p99_ms=p50 * 2,
        mean_ms=p50, p50_low_ms=p50 * 0.99, p50_high_ms=p50 * 1.01, noise=0.01, ratio=ratio,
        ratio_low=None if ratio is None else ratio * 0.98, ratio_high=None if ratio is None else ratio * 1.02,
    )  # fmt: skip
    return msgspec.structs.replace(report, **changes)


def candidate(name: str, status: Status = "passed", size_bytes: int | None = 100_000, **fields) -> Candidate:
    artifact = None
    if size_bytes is not None:
        artifact = ModelArtifact(path="m.onnx", digest=DIGEST, size_bytes=size_bytes, format="onnx", inputs=(), outputs=())
    checks = (BudgetCheck(name="top1_drop", operator="<=", limit=0.01, value=0.002, is_met=status != "missed"),)
    step = PassStep(name="quantize", settings={"bits": 8}, parent=None, output=DIGEST, seconds=0.1, versions={"onnx": "1"})
    return Candidate(
        name=name, target="board", target_digest=DIGEST, contract=Contract(inputs=(), outputs=()), seed=0,
        source=SourceModel(spec="m.onnx", kind="onnx", digest=DIGEST, size_bytes=315_000), edgekit_version="0",
        verdict=Verdict(status=status, is_budget_met=status in ("chosen", "passed"), reason=f"reason of {name}", checks=checks),
        created_at=datetime(2026, 1, 2, tzinfo=UTC), artifact=artifact, lineage=(step,), **fields,
    )  # fmt: skip


def base(**changes) -> Candidate:
    fields = {"evaluation": evaluation(0.0, 0.0, 0.0), "latency": timing(2.0, None), **changes}
    return candidate("fp32", size_bytes=315_000, **fields)


def good(**changes) -> Candidate:
    return candidate("int8", "chosen", **{"evaluation": evaluation(), "latency": timing(), **changes})


def outcome(*candidates: Candidate, **changes) -> OptimizeResult:
    chosen = next((item for item in candidates if item.verdict.status == "chosen"), candidates[0])
    request = RequestSummary(
        model="m.onnx", target="board", data="d.npz", evaluation=None, metric="top1", budget="top1_drop<=0.01",
        is_default_budget=True, effort="default", seed=0, threads=1,
    )  # fmt: skip
    data = DataDescription(role="evaluation", source="d.npz", digest=DIGEST, samples=1000, has_labels=True)
    result = OptimizeResult(
        request=request, target=TARGET, baseline=candidates[0], candidates=candidates, chosen=chosen, data=(data,),
        is_budget_met=True, verdict="Budget met: fine.", seconds=1.0, host=HOST,
    )  # fmt: skip
    return msgspec.structs.replace(result, **changes)


class Page(HTMLParser):
    """Tags in order, checked for balance, with the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts).replace("\u00a0", " ")

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


EXTREMES = {
    "one": outcome(candidate("fp32", "chosen", evaluation=evaluation(0.0, 0.0, 0.0), latency=timing(2.0, None))),
    "forty": outcome(
        base(), good(), *(candidate(f"c{i}", evaluation=evaluation(i / 1e3), latency=timing(i + 1.0)) for i in range(38))
    ),
    "failed": outcome(base(), good(), candidate("broken", "failed", None)),
    "identical": outcome(base(), good(), *(candidate(f"same{i}", evaluation=evaluation(), latency=timing()) for i in range(5))),
    "no latency": outcome(base(latency=None), good(latency=None)),
    "no evaluation": outcome(base(evaluation=None), good(evaluation=None)),
    "nothing measured": outcome(base(evaluation=None, latency=None), good(evaluation=None, latency=None)),
    "negative drop": outcome(base(), good(evaluation=evaluation(-0.02, -0.03, -0.01))),
    "zero latency": outcome(base(latency=timing(0.0, None)), good(latency=timing(0.0, 0.5))),
    "far outlier": outcome(base(), good(latency=timing(p99_ms=900.0))),
    "lower is better": outcome(base(), good(evaluation=evaluation(metric="mse", is_higher_better=False, value=0.902))),
    "infinite value": outcome(base(), good(evaluation=evaluation(value=INF, baseline=INF))),
    "infinite latency": outcome(base(), good(latency=timing(p50_ms=INF, p90_ms=INF, p99_ms=INF, ratio=INF))),
    "unknown latency": outcome(base(), good(latency=timing(p50=NAN))),
    "infinite interval": outcome(base(), good(evaluation=evaluation(0.1, -INF, INF))),
    "ratio of nothing": outcome(base(), good(latency=timing(ratio=0.0))),
    "unknown class": outcome(base(), good(evaluation=evaluation(per_class={"0": NAN, "1": 0.5}))),
    "baseline failed": outcome(candidate("fp32", "failed", None), is_budget_met=False),
    "infinite sqnr": outcome(base(), good(evaluation=evaluation(extra={"sqnr_db": float("inf")}))),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_page_of_extreme_runs(name):
    result = EXTREMES[name]
    html = render_page(result)
    page = Page(html)
    for item in result.candidates:
        assert item.name in page.text
        assert f"reason of {item.name}" in page.text
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    assert page.count("figure") == page.count("figcaption")


def test_ids_are_unique_and_references_resolve():
    page = Page(render_page(EXTREMES["forty"]))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"candidates", "latency", "lineage", "data", "notes"} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(ids)


def cells_of(html: str, name: str) -> dict[str, str]:
    """The cells of a candidate's row in the table of candidates, by their column."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html.split('id="candidates"')[1].split("</section>", maxsplit=1)[0], re.DOTALL)
    row = next(row for row in rows if f"</svg>{name}</span>" in row)
    cells = re.findall(r'<td[^>]*data-label="([^"]*)"[^>]*>(.*?)</td>', row, re.DOTALL)
    return {label: " ".join(Page(content).text.split()) for label, content in cells}


def test_table_shows_the_figures_of_the_records():
    report = evaluation(0.0123, 0.0101, 0.0145)
    timed = timing(0.417, 0.2083, ratio_low=0.2051, ratio_high=0.2119, p90_ms=0.533, p99_ms=0.871)
    other = candidate("int4", "missed", 54_321, evaluation=report, latency=timed)
    cells = cells_of(render_page(outcome(base(), good(), other)), "int4")
    assert cells == {
        "verdict": "misses the budget reason of int4",
        "top-1 accuracy": "88.77 %",
        "change": "\u22121.23 \u22121.45 to \u22121.01",
        "median, ms": "0.417 p90 0.533 p99 0.871",
        "time against fp32": "0.21\u00d7 0.205 to 0.212",
        "size": "54.32 kB",
    }


def test_table_begins_with_the_chosen_one_and_ends_with_failures():
    broken, missed = candidate("broken", "failed", None), candidate("late", "missed", latency=timing(0.1))
    slow, fast = (candidate(name, latency=timing(p50)) for name, p50 in (("slow", 3.0), ("fast", 0.5)))
    html = render_page(outcome(base(), broken, missed, slow, fast, good()))
    names = re.findall(r'<span class="with-icon"><svg [^>]*>.*?</svg>([^<]*)</span></th>', html)
    assert names == ["int8", "fp32", "fast", "slow", "late", "broken"]


def test_candidates_without_a_figure_are_named_as_not_drawn():
    text = Page(render_page(EXTREMES["failed"])).text
    assert text.count("Not drawn, since a figure is missing: broken.") == 3
    assert "Not drawn" not in Page(render_page(EXTREMES["identical"])).text


def test_arrow_of_a_cut_whisker_is_explained():
    assert "An arrow: p99 lies beyond the plot" in Page(render_page(EXTREMES["far outlier"])).text
    assert "An arrow" not in Page(render_page(EXTREMES["identical"])).text


def test_noise_floor_is_a_band_around_the_baseline():
    html = render_page(outcome(base(latency=timing(2.0, None, noise=0.08)), good(latency=timing(noise=0.05))))
    assert html.count('class="band"') == 3
    assert "within 8 % of fp32: a tie" in Page(html).text
    assert "Noise floor of this run (fp32 against itself): 8.0 %" in Page(html).text
    assert "within 2 % of fp32: a tie" in Page(render_page(EXTREMES["identical"])).text
    assert 'class="band"' not in render_page(outcome(base(latency=None), good()))


def axis(*limits: Limit, is_lower_better: bool = True) -> Axis:
    return Axis(title="t", format_tick=lambda value, _step: f"{value:g}", is_lower_better=is_lower_better, limits=limits)


def point(name: str, x: float, y: float, rank: int = 2) -> Point:
    return Point(name=name, x=x, y=y, shape="circle", kind="passed", title=name, is_on_front=True, rank=rank)


@pytest.mark.parametrize(("value", "words"), [(500.0, "cap \u2192"), (-500.0, "\u2190 cap"), (1.5, "cap")])
def test_limit_outside_the_axis_is_named_at_its_edge(value, words):
    limit = Limit(value=value, is_upper=True, label="cap")
    svg = scatter(
        [point("a", 1.0, 1.0), point("b", 2.0, 2.0)], axis(limit), axis(is_lower_better=False), width=600, height=300, label=""
    )
    assert f">{words}</text>" in svg
    assert ('class="limit"' in svg) == (value == 1.5)
    area = float(re.search(r'<rect [^>]*width="([\d.]+)"[^>]*class="beyond"', svg)[1])
    assert (area == 0) == (value == 500.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1)), min_size=1, max_size=14), st.sampled_from([340, 600, 1000]))
def test_labels_do_not_overlap_and_stay_inside(places, width):
    points = [point(f"candidate-{index}", x, y, rank=min(index, 3)) for index, (x, y) in enumerate(places)]
    svg = scatter(points, axis(), axis(is_lower_better=False), width=width, height=400, label="")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name passed" text-anchor="(\w+)">([^<]*)<', svg)
    boxes = []
    for at, line, anchor, name in found:
        wide = len(name) * CHARACTER_PX
        start = float(at) - (wide if anchor == "end" else 0)
        boxes.append((start, float(line) - 10, start + wide, float(line) + 3))
        assert start >= 0
        assert start + wide <= width
    for index, left in enumerate(boxes):
        for right in boxes[:index]:
            is_apart = left[2] <= right[0] + 0.1 or right[2] <= left[0] + 0.1 or abs(left[1] - right[1]) >= 12.9
            assert is_apart


def test_page_is_self_contained():
    html = render_page(EXTREMES["forty"])
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "style", "srcset", "action"}
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert links
    assert set(links) <= {f"#{attributes.get('id')}" for _, attributes in page.tags}
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)
    expected = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{expected}'; base-uri 'none'; form-action 'none'"


def test_hostile_text_stays_text():
    step = PassStep(
        name=HOSTILE,
        settings={HOSTILE: HOSTILE},
        parent=None,
        output=DIGEST,
        seconds=1.0,
        versions={HOSTILE: "1"},
        notes=(HOSTILE,),
    )
    report = evaluation(metric=HOSTILE, per_class={HOSTILE: 0.5, "b": 0.4})
    verdict = Verdict(
        status="chosen", is_budget_met=True, reason=HOSTILE,
        checks=(BudgetCheck(name=HOSTILE, operator="<=", limit=1.0, value=0.5, is_met=True, note=HOSTILE),),
    )  # fmt: skip
    chosen = msgspec.structs.replace(good(evaluation=report), name=HOSTILE, verdict=verdict, lineage=(step,))
    data = DataDescription(role=HOSTILE, source=HOSTILE, digest=DIGEST, samples=1, has_labels=True, class_counts={HOSTILE: 1})
    op = OpLatency(op_type=HOSTILE, count=1, ms=1.0, share=1.0)
    baseline = base(evaluation=evaluation(metric=HOSTILE, per_class={HOSTILE: 0.6, "b": 0.4}))
    result = outcome(
        baseline, chosen, verdict=HOSTILE, warnings=(HOSTILE,), data=(data,), op_latency={HOSTILE: (op,)},
        target=msgspec.structs.replace(TARGET, name=HOSTILE, title=HOSTILE, cpu=HOSTILE),
        host=msgspec.structs.replace(HOST, cpu=HOSTILE, os=HOSTILE),
    )  # fmt: skip
    html = render_page(result)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)</script>" in page.text


@given(st.text(), st.text())
def test_markup_gives_back_the_text(content, attribute):
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.handle_data = texts.append
    parser.feed(element("p", content, title=attribute))
    parser.close()
    assert [tag for tag, _ in tags] == ["p"]
    assert set(tags[0][1]) == {"title"}
    assert len("".join(texts)) == len(content)


def test_written_json_is_the_record(tmp_path: Path):
    result = EXTREMES["failed"]
    write_report(tmp_path / "new", result)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
    assert decode_json((tmp_path / "new" / "report.json").read_bytes(), OptimizeResult) == result
    assert (tmp_path / "new" / "report.html").read_text("utf-8") == render_page(result)


def test_headline_claims_only_what_intervals_allow():
    assert (
        headline(outcome(base(), good()))
        == "Use int8: 2.00\u00d7 faster and 3.15\u00d7 smaller than fp32, with no measurable change in top-1 accuracy."
    )
    worse = good(evaluation=evaluation(0.02, 0.01, 0.03))
    assert "at \u22122.00\u00a0points of top-1 accuracy" in headline(outcome(base(), worse))
    tie = good(latency=timing(2.0, 1.01, ratio_low=0.97, ratio_high=1.05))
    assert "as fast and 3.15\u00d7 smaller" in headline(outcome(base(), tie))
    slower = good(latency=timing(2.8, 1.4))
    assert "1.40\u00d7 slower but 3.15\u00d7 smaller than fp32" in headline(outcome(base(), slower))
    assert headline(outcome(base(), good(), is_budget_met=False)) == "No candidate meets the budget; int8 comes nearest."
    assert headline(EXTREMES["one"]).startswith("Keep fp32")


def test_foreign_hardware_is_said_first():
    result = outcome(base(latency=timing(2.0, None, is_on_target=False)), good(latency=timing(is_on_target=False)))
    text = Page(render_page(result)).text
    assert "2.00\u00d7 faster here" in headline(result)
    assert "this host's, not those of board" in text.split("Accuracy against latency")[0]
    assert "matches the target" not in text


def test_unmeasured_term_is_not_called_met():
    chosen = good()
    check = BudgetCheck(name="latency_ms", operator="<=", limit=5.0, value=None, is_met=True, note="not measured")
    chosen = msgspec.structs.replace(chosen, verdict=msgspec.structs.replace(chosen.verdict, checks=(check,)))
    text = Page(render_page(outcome(base(), chosen))).text
    assert "? not measured" in text
    assert "\u2713 met" not in text


def test_negative_drop_is_a_gain():
    assert change_words(evaluation(-0.02, -0.03, -0.01)) == "+2.00\u00a0points (95\u00a0% interval +1.00 to +3.00)"


def test_tie_and_speed():
    assert is_tie(timing(ratio=1.015))
    assert not is_tie(timing(ratio=0.5))
    assert speed(timing(ratio=2.0)) == "2.00\u00d7 slower"


def test_front_keeps_equal_points_and_drops_beaten_ones():
    points = [(1.0, 0.9), (1.0, 0.9), (2.0, 0.95), (2.0, 0.8), (3.0, 0.95)]
    assert find_front(points, is_y_lower_better=False) == {0, 1, 2}
    assert find_front(points, is_y_lower_better=True) == {0, 1, 3}


@given(st.lists(st.floats(-1e6, 1e6), max_size=8))
def test_axis_holds_its_values_and_has_round_ticks(values):
    low, high = span(values)
    assert low < high
    assert all(low - 1e-19 <= value <= high + 1e-19 for value in values)
    ticks = nice_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 12
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in ticks)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_never_have_an_exponent(value):
    assert "e" not in significant(value)


@given(st.text(), st.integers(4, 40))
def test_shortened_names_fit(name, length):
    assert len(shorten(name, length)) <= max(length, 1)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("takes 1.68x the time of a", "takes 1.68\u00d7 the time of a"),
        ("conv3x faster-2x", "conv3x faster-2x"),
        ("95 % of 3 MB in 5 ms", "95\u00a0% of 3\u00a0MB in 5\u00a0ms"),
        ("3 msec", "3 msec"),
    ],
)
def test_typeset_changes_units_and_factors_and_no_names(sentence, expected):
    assert typeset(sentence) == expected
