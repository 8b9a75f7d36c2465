"""``edgekit monitor replay``: recorded rows and exported windows, judged as the server judges them."""

from __future__ import annotations

import json
import re
import zlib

import numpy as np
import pytest

from edgekit.cli.main import main
from edgekit.cli.monitor import parse_budget, parse_duration
from edgekit.errors import UsageError
from edgekit.monitor.intervals import DeviceWindow
from edgekit.monitor.replay import RecordedWindow
from edgekit.monitor.sketch import Sketcher, build_profile
from edgekit.schema.base import encode_json

NAMES = ["temperature", "rate", "load"]


def answers(x, rng):
    scores = np.exp(2 * x)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores, np.array([rng.choice(3, p=row) for row in scores])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A profile, rows that drift at 2,000, rows that do not."""
    path = tmp_path_factory.mktemp("replay")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, 3))
    scores, labels = answers(x, rng)
    profile = build_profile({"x": x}, {"y": scores}, columns={"x": NAMES}, scores="y", labels=labels)
    (path / "profile.json").write_bytes(encode_json(profile))
    moved = rng.normal(size=(4000, 3))
    moved[2000:, 0] += 0.6
    for name, rows in (("drift", moved), ("calm", rng.normal(size=(4000, 3)))):
        scores, labels = answers(rows, rng)
        site = rng.choice(["north", "south"], len(rows))
        np.savez(path / f"{name}.npz", x=rows, y=scores, labels=labels)
        lines = [",".join([*NAMES, "label", "y_0", "y_1", "y_2", "site", "when"])]
        lines += [
            ",".join(map(str, [*row, label, *score, where, at]))
            for at, (row, label, score, where) in enumerate(zip(rows, labels, scores, site, strict=True))
        ]
        (path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    np.savez(path / "reference.npz", x=x[:2000])
    return path


def run(capsys, folder, *arguments):
    code = main(["monitor", "replay", *map(str, arguments), "--baseline", str(folder / "profile.json")])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_drift_of_a_column_is_named_with_its_delay_and_evidence(folder, capsys):
    code, out, _ = run(capsys, folder, folder / "drift.csv", "--slice", "site", "--drift-at", "2000", "--json")
    found = json.loads(out)
    assert code == 1
    first = next(alarm for alarm in found["alarms"] if alarm["slice"] == "all" and alarm["stream"] == "temperature")
    assert first["window"] in {11, 12}
    assert first["delay"] == first["window"] - 10
    assert first["evidence"] > first["threshold"]
    assert first["effect"] > 0.05
    assert "mean about" in first["what"]
    assert set(found["slices"]) == {"all", "site=north", "site=south"}
    assert not any(alarm["stream"] in {"rate", "load"} for alarm in found["alarms"])
    assert all(alarm["is_inhibited"] for alarm in found["alarms"] if alarm["stream"] == "temperature" and alarm is not first)
    last = found["quality"][-1]
    assert last["estimated_low"] < last["estimated"] < last["estimated_high"]
    assert last["labelled"] == 200


def test_table_says_it_in_a_line_each(folder, capsys):
    code, out, _ = run(capsys, folder, folder / "drift.npz", "--window", "500")
    assert code == 1
    assert re.search(r"temperature\s+all", out)
    assert "drift: " in out
    assert "estimated" in out


def test_calm_data_gives_no_alarm_in_any_form(folder, capsys):
    for name in ("calm.csv", "calm.npz"):
        code, out, _ = (
            run(capsys, folder, folder / name, "--time", "when") if name.endswith("csv") else run(capsys, folder, folder / name)
        )
        assert code == 0
        assert "no drift" in out


def test_report_is_one_page_without_scripts_or_anything_from_elsewhere(folder, capsys, tmp_path):
    page = tmp_path / "out.html"
    run(capsys, folder, folder / "drift.csv", "--report", page)
    text = page.read_text()
    assert "<svg" in text
    assert "temperature" in text
    assert "<script" not in text
    assert not re.search(r"(src|href)=", text)


def test_windows_of_an_export_are_judged_by_the_same_engine(folder, capsys, tmp_path):
    from edgekit.schema.base import decode_json
    from edgekit.schema.baseline import ReferenceProfile

    data = (folder / "profile.json").read_bytes()
    profile, rng = decode_json(data, ReferenceProfile), np.random.default_rng(3)
    lines = []
    for minute in range(20):
        for device in range(4):
            sketcher = Sketcher(profile)
            x = rng.normal(0.8 if minute >= 10 else 0.0, 1.0, (60, 3))
            sketcher.observe({"x": x}, {"y": answers(x, rng)[0]})
            window = DeviceWindow(device=f"lab/{device}", samples=60, sketched=60, sketches=sketcher.take())
            lines.append(
                encode_json(
                    RecordedWindow(start_ms=minute * 600_000, profile=zlib.crc32(data), window=window, slices=("site=lab",))
                )
            )
    file = tmp_path / "kws.windows.jsonl"
    file.write_bytes(b"\n".join(json.dumps(json.loads(line)).encode() for line in lines))
    code, out, _ = run(capsys, folder, file, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["windows"] == 20
    assert min(alarm["window"] for alarm in found["alarms"]) in {11, 12}
    code, _, err = run(capsys, folder, file, "--device", "site")
    assert code == 2
    assert "--device" in err


def test_columns_together_are_tested_against_raw_rows(folder, capsys, tmp_path):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3000, 3))
    x[1500:, 1] = 0.8 * x[1500:, 0] + 0.6 * x[1500:, 1]
    np.savez(tmp_path / "turned.npz", x=x)
    code, out, _ = run(capsys, folder, tmp_path / "turned.npz", "--reference", folder / "reference.npz", "--json")
    found = json.loads(out)
    assert code == 1
    kinds = {alarm["kind"] for alarm in found["alarms"]}
    assert "classifier" in kinds
    assert kinds <= {"classifier", "mmd"}, "each column alone is as before"
    assert all(alarm["first_row"] >= 1500 for alarm in found["alarms"])


def test_concept_drift_by_the_bet_and_by_river(folder, capsys, tmp_path):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6000, 3))
    scores, labels = answers(x, rng)
    labels[3000:] = rng.integers(0, 3, 3000)
    np.savez(tmp_path / "labels.npz", x=x, y=scores, labels=labels)
    for method in ("betting", "adwin"):
        code, out, _ = run(capsys, folder, tmp_path / "labels.npz", "--concept", method, "--json")
        found = json.loads(out)
        assert code == 1
        assert not found["alarms"], "inputs are as before"
        assert found["concept"][0]["first_row"] >= 2800


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.csv"], "no such file"),
        (["drift.csv", "--budget", "often"], "--budget 'often'"),
        (["drift.csv", "--budget", "0/month"], "not a budget"),
        (["drift.csv", "--every", "soon"], "--every 'soon'"),
        (["drift.csv", "--window", "0"], "--window 0"),
        (["drift.csv", "--slice", "colour"], "no column 'colour'"),
        (["drift.csv", "--effect-floor", "3"], "--effect-floor"),
        (["drift.csv", "--concept", "magic"], "--concept 'magic'"),
        (["profile.json"], "no table"),
    ],
)
def test_bad_argument_is_named(folder, capsys, arguments, says):
    code, _, err = run(capsys, folder, folder / arguments[0], *arguments[1:])
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_data_that_has_none_of_the_streams_is_refused(folder, capsys, tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    code, _, err = run(capsys, folder, tmp_path / "other.csv")
    assert code == 2
    assert "temperature" in err
    code = main(["monitor", "replay", str(folder / "drift.csv"), "--baseline", str(tmp_path / "none.json")])
    assert code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/month", (1.0, 30.0)),
        ("2 per week", (2.0, 7.0)),
        ("3/90 days", (3.0, 90.0)),
        ("0.5 a day", (0.5, 1.0)),
        ("1/90d", (1.0, 90.0)),
    ],
)
def test_budget_is_read(text, expected):
    assert parse_budget(text) == expected


def test_duration_is_read():
    assert [parse_duration(text, "--every") for text in ("30s", "10min", "1 hour", "2 days")] == [30, 600, 3600, 172_800]
    with pytest.raises(UsageError, match="--every"):
        parse_duration("0s", "--every")
