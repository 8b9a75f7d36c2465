"""``edgekit target`` as it is typed."""

from __future__ import annotations

import json

import pytest

from edgekit.cli.main import main
from edgekit.target.load import list_targets, load_target
from edgekit.target.probe import probe_target


def test_list_has_every_profile(capsys):
    assert main(["target", "list"]) == 0
    out = capsys.readouterr().out
    for profile in list_targets():
        assert profile.name in out
    assert "u8s8, per channel, 7-bit weights" in out


def test_list_as_json_is_the_records(capsys):
    assert main(["target", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == [profile.name for profile in list_targets()]


def test_show_gives_facts_with_sources(capsys):
    assert main(["target", "show", "raspberry-pi-4"]) == 0
    out = capsys.readouterr().out
    profile = load_target("raspberry-pi-4")
    for text in (profile.title, profile.cpu, profile.sources["isa"], profile.notes):
        assert text in out


def test_show_unknown_is_exit_2_with_a_suggestion(capsys):
    assert main(["target", "show", "rasberry-pi-4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'did you mean "raspberry-pi-4"?' in captured.err


@pytest.mark.parametrize("by", ["out", "stdout"])
def test_probe_writes_what_check_accepts(tmp_path, capsys, by):
    path = tmp_path / "lab.toml"
    if by == "out":
        assert main(["target", "probe", "--name", "lab", "--out", str(path)]) == 0
        assert capsys.readouterr().out == ""
    else:
        assert main(["target", "probe", "--name", "lab"]) == 0
        path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_target(str(path)) == probe_target("lab")
    assert main(["target", "check", str(path)]) == 0
    assert "ok" in capsys.readouterr().out


def test_check_stops_at_a_typo(tmp_path, capsys):
    path = tmp_path / "typo.toml"
    assert main(["target", "probe", "--out", str(path)]) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("\ncores", "\ncoress"), encoding="utf-8")
    assert main(["target", "check", str(path)]) == 2
    assert 'did you mean "cores"?' in capsys.readouterr().err


def test_check_of_another_file_kind(tmp_path, capsys):
    assert main(["target", "check", str(tmp_path / "model.onnx")]) == 2
    assert "not a .toml file" in capsys.readouterr().err
