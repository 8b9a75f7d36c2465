from __future__ import annotations

import json
import socket

import pytest
from releases import tiny_bundle

from edgekit.cli.main import main
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture
def repo(tmp_path, signer, capsys):
    save_public_key(signer.public_key, tmp_path / "publisher.pub")
    assert run(capsys, "repo", "init", tmp_path / "repo", "--keys", tmp_path / "keys" / "repository")[0] == 0
    assert run(capsys, "repo", "trust", tmp_path / "repo", tmp_path / "publisher.pub")[0] == 0
    return tmp_path / "repo"


def test_init_says_what_to_give_to_devices(tmp_path, capsys):
    code, out, err = run(capsys, "repo", "init", tmp_path / "r")
    assert code == 0
    assert "1.root.json" in out
    assert str(tmp_path / "keys") in err
    assert (tmp_path / "keys" / "root.pem").is_file()
    assert run(capsys, "repo", "init", tmp_path / "r")[0] == 2


def test_publish_status_and_rollback_by_republishing(repo, tmp_path, signer, capsys):
    first = tiny_bundle(tmp_path / "1.edgekit", signer)
    code, out, _ = run(capsys, "repo", "publish", repo, first, "--notes", "hello")
    assert (code, "kws@1.0.0 is release 1 on production" in out) == (0, True)
    assert run(capsys, "repo", "publish", repo, tiny_bundle(tmp_path / "2.edgekit", signer, version="2.0.0"))[0] == 0
    code, out, _ = run(capsys, "repo", "publish", repo, first, "--again", "--json")
    assert (code, json.loads(out)["info"]["counter"]) == (0, 3)
    code, out, _ = run(capsys, "repo", "status", repo)
    assert code == 0
    for word in ("kws", "2.0.0", "production", "timestamp", signer.keyid[:12]):
        assert word in out
    code, out, _ = run(capsys, "repo", "status", repo, "--json")
    assert [release["info"]["counter"] for release in json.loads(out)["releases"]] == [2, 3]


def test_publish_refused_exits_4(repo, tmp_path, capsys):
    code, out, err = run(capsys, "repo", "publish", repo, tiny_bundle(tmp_path / "1.edgekit", generate_signer()))
    assert (code, out) == (4, "")
    assert "signed by key" in err


def test_publish_changed_content_exits_3(repo, tmp_path, signer, capsys):
    run(capsys, "repo", "publish", repo, tiny_bundle(tmp_path / "1.edgekit", signer))
    code, _, err = run(capsys, "repo", "publish", repo, tiny_bundle(tmp_path / "1.edgekit", signer, model=b"x"))
    assert code == 3
    assert "--version" in err


def test_publish_where_is_no_repository(tmp_path, signer, capsys):
    code, _, err = run(capsys, "repo", "publish", tmp_path / "none", tiny_bundle(tmp_path / "1.edgekit", signer))
    assert code == 3
    assert "repo init" in err


def test_refresh_and_check(repo, tmp_path, signer, capsys):
    run(capsys, "repo", "publish", repo, tiny_bundle(tmp_path / "1.edgekit", signer))
    code, out, _ = run(capsys, "repo", "refresh", repo)
    assert code == 0
    assert "timestamp  version 3" in out
    assert run(capsys, "repo", "check", repo)[0] == 0
    next((repo / "blobs" / "sha256").iterdir()).unlink()
    code, out, _ = run(capsys, "repo", "check", repo)
    assert code == 1
    assert "missing" in out


def test_serve_on_a_port_in_use_exits_3(repo, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = run(capsys, "repo", "serve", repo, "--port", port)
    assert code == 3
    assert f"port {port}" in err


def test_trust_a_private_key_exits_2(repo, tmp_path, capsys):
    code, _, err = run(capsys, "repo", "trust", repo, tmp_path / "keys" / "repository" / "root.pem")
    assert code == 2
    assert "private key" in err
