"""``edgekit trust`` as its users type it."""

from __future__ import annotations

import json
import stat

import pytest

from edgekit.cli.main import main


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    assert main(["trust", "init", str(folder), "--root-keys", "3", "--threshold", "2"]) == 0
    (tmp_path / "usb").mkdir()
    for name in ("root-2", "root-3"):
        (tmp_path / "keys" / f"{name}.pem").rename(tmp_path / "usb" / f"{name}.pem")
    return folder


def run(capsys, *words):
    capsys.readouterr()
    code = main(["trust", *map(str, words)])
    return code, *capsys.readouterr()


def test_init_says_what_to_do_with_the_keys(repo, tmp_path, capsys):
    code, out, err = run(capsys, "status", repo)
    assert code == 0
    assert "2 of 3" in out
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [*(tmp_path / "keys").glob("*.pem"), *(tmp_path / "usb").iterdir()]}
    assert modes == {0o600}
    code, _, err = run(capsys, "init", tmp_path / "second", "--keys", tmp_path / "k2")
    assert "move root-*.pem" in err
    assert "not encrypted" in err


def test_keys_with_a_passphrase(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", "correct horse")
    code, _, err = run(capsys, "init", tmp_path / "r", "--keys", tmp_path / "k")
    assert (code, "not encrypted" in err) == (0, False)
    assert all(b"ENCRYPTED" in path.read_bytes() for path in (tmp_path / "k").glob("*.pem"))
    assert run(capsys, "refresh", tmp_path / "r")[0] == 0
    monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", "wrong")
    code, _, err = run(capsys, "refresh", tmp_path / "r")
    assert (code, "passphrase" in err, "wrong" in err) == (2, True, False)


def test_rotation_waits_travels_as_a_file_and_is_published(repo, tmp_path, capsys):
    code, out, _ = run(capsys, "rotate", repo, "timestamp", "--old", "timestamp", "--new", "generate")
    assert code == 1
    assert "1 more signature" in out
    assert "root-1" in out
    file = tmp_path / "usb" / "root.json"
    code, out, _ = run(capsys, "export", repo, "root", "--out", file)
    assert (code, "timestamp: removes key" in out) == (0, True)
    code, out, _ = run(capsys, "sign", file, "--key", tmp_path / "usb" / "root-2.pem")
    assert (code, "signed by" in out) == (0, True)
    code, out, _ = run(capsys, "merge", repo, file)
    assert (code, "root: published" in out) == (0, True)
    code, out, _ = run(capsys, "status", repo, "--json")
    record = json.loads(out)
    assert [role["version"] for role in record["roles"] if role["role"] == "root"] == [2]
    assert record["waiting"] == []


def test_sign_with_a_key_of_nobody_exits_4(repo, tmp_path, capsys):
    run(capsys, "rotate", repo, "snapshot", "--old", "snapshot", "--new", "generate")
    assert main(["bundle", "keygen", "--out", str(tmp_path / "stranger")]) == 0
    code, _, err = run(capsys, "sign", repo, "--key", tmp_path / "stranger.pem")
    assert (code, "none of the keys" in err) == (4, True)


def test_delegate_shows_the_family_and_is_taken_back(repo, capsys):
    code, out, _ = run(capsys, "delegate", repo, "audio", "--models", "kws*")
    assert (code, "published" in out) == (0, True)
    assert "audio signs releases of kws*" in run(capsys, "status", repo)[1]
    assert run(capsys, "delegate", repo, "audio", "--models", "x")[0] == 2
    assert run(capsys, "delegate", repo, "audio", "--remove")[0] == 0
    assert "audio" not in run(capsys, "status", repo)[1]


def test_doctor_exits_1_when_something_is_wrong(repo, tmp_path, capsys):
    assert run(capsys, "doctor", repo)[0] == 0
    (tmp_path / "keys" / "timestamp.pem").chmod(0o644)
    code, out, _ = run(capsys, "doctor", repo)
    assert (code, "mode 0644" in out) == (1, True)
    (tmp_path / "keys" / "timestamp.pem").chmod(0o600)
    code, out, _ = run(capsys, "doctor", repo, "--days", "400", "--json")
    assert (code, [fault["level"] for fault in json.loads(out)][:1]) == (0, ["warning"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["rotate", "REPO", "root"], "nothing to change"),
        (["rotate", "REPO", "nobody", "--new", "generate"], "no such role"),
        (["rotate", "REPO", "targets", "--old", "nothing"], "not one of its keys"),
        (["rotate", "REPO", "targets", "--threshold", "3"], "cannot be reached"),
        (["revoke", "REPO", "nothing", "--reason", "lost"], "no role has this key"),
        (["delegate", "REPO", "Audio", "--models", "x"], "not a name for a role"),
        (["delegate", "REPO", "audio", "--models", "a/b"], "slash"),
        (["sign", "REPO"], "nothing waits"),
        (["export", "REPO", "root", "--out", "x.json"], "nothing waits"),
        (["init", "REPO"], "is here already"),
        (["init", "NEW", "--expire", "root=soon"], "expected ROLE=DAYS"),
    ],
)
def test_wrong_words_exit_2_and_change_nothing(repo, tmp_path, capsys, words, text):
    from releases import tree_digests

    before = tree_digests(repo)
    given = [{"REPO": str(repo), "NEW": str(tmp_path / "new")}.get(word, word) for word in words]
    code, _, err = run(capsys, *given)
    assert (code, text in err) == (2, True), err
    assert tree_digests(repo) == before


def test_timer_units_name_the_repository(repo, tmp_path, capsys):
    assert run(capsys, "timer", repo, "--out", tmp_path / "units")[0] == 0
    service = (tmp_path / "units" / "edgekit-refresh.service").read_text()
    assert f"trust refresh {repo}" in service
    assert "PrivateNetwork=yes" in service
