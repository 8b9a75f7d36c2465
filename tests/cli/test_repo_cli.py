from __future__ import annotations

import json
import shutil
import socket
from datetime import UTC, datetime, timedelta

import pytest
from releases import tiny_bundle

from edgekit.cli.main import main
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer
from tests.repository.registry_world import Registry

TODAY = datetime.now(UTC)


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


# --- what happens to releases afterwards


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A gated repository; release 1.0.0 on dev and staging, 1.1.0 on dev, both with the same model."""
    made = Registry(tmp_path_factory.mktemp("gated") / "w")
    made.make(now=TODAY)
    made.publish("1.0.0", now=TODAY)
    made.promote(now=TODAY)
    made.publish("1.1.0", now=TODAY)
    made.samples()
    return made


@pytest.fixture
def registry(gated, tmp_path):
    shutil.copytree(gated.folder, tmp_path / "w")
    return Registry(tmp_path / "w")


def promote(capsys, registry, *more, release="kws@1.1.0"):
    data = registry.folder / "labelled.npz"
    return run(capsys, "repo", "promote", registry.repo, release, "--to", "staging", "--data", data, "--seconds", "0.02", *more)


def test_promote_shows_every_gate_and_exits_1_when_one_says_no(registry, capsys):
    code, out, _ = promote(capsys, registry, "--gate", "hours>=24")
    assert code == 1
    for words in ("kws@1.1.0: dev → staging, against kws@1.0.0", "variant fp32", "h to go", "nothing was changed"):
        assert words in out
    assert [line.split()[0] for line in out.splitlines()[3:9]] == [
        "contract",
        "golden",
        "drop",
        "latency_ratio",
        "publishers",
        "hours",
    ]
    code, out, _ = promote(capsys, registry, "--dry-run")
    assert (code, "it would be promoted" in out) == (0, True)
    code, out, err = promote(capsys, registry, "--json")
    report = json.loads(out)
    assert (code, report["is_passed"], report["counter"], report["evaluation"]["drop"]) == (0, True, 4, 0.0)
    assert err == ""


def test_promote_with_arguments_that_do_not_fit_exits_2_or_3(registry, capsys):
    assert promote(capsys, registry, release="kws")[0] == 2
    assert promote(capsys, registry, "--gate", "drop>=1")[0] == 2
    assert promote(capsys, registry, "--skip-gate", "drop")[0] == 2
    code, _, err = run(capsys, "repo", "promote", registry.repo, "kws@1.1.0", "--to", "production")
    assert (code, "not on staging" in err) == (3, True)


def test_gates_are_shown_and_changed(registry, capsys):
    assert "drop<=0.01" in run(capsys, "repo", "gates", registry.repo)[1]
    code, out, _ = run(capsys, "repo", "gates", registry.repo, "drop<=0.5, hours>=1", "--not-gated")
    assert (code, "drop<=0.5, latency_ratio<=1.1, publishers>=1, hours>=1" in out) == (0, True)
    assert json.loads(run(capsys, "repo", "gates", registry.repo, "--json")[1])["min_hours"] == 1.0


def test_rollback_recall_and_lift(registry, capsys):
    promote(capsys, registry)
    code, out, _ = run(capsys, "repo", "rollback", registry.repo, "kws", "--channel", "staging", "--reason", "drift")
    assert (code, "kws@1.0.0 is release 5 on staging" in out) == (0, True)
    code, out, _ = run(capsys, "repo", "recall", registry.repo, "kws@1.1.0", "--deadline", "+7d", "--reason", "mixes a and b")
    assert (code, "recalled" in out) == (0, True)
    _, out, _ = run(capsys, "repo", "status", registry.repo)
    assert "mixes a and b" in out
    assert "recalled sha256:" in out
    assert len(json.loads(run(capsys, "repo", "status", registry.repo, "--json")[1])["recalls"]) == 1
    assert run(capsys, "repo", "recall", registry.repo, "kws@1.1.0", "--reason", "x")[0] == 2
    assert run(capsys, "repo", "recall", registry.repo, "kws@1.1.0", "--reason", "a mistake", "--lift")[0] == 0
    assert json.loads(run(capsys, "repo", "status", registry.repo, "--json")[1])["recalls"] == []


def test_status_shows_parent_and_validity(registry, capsys):
    bundle = registry.bundle("1.2.0")
    code, _, err = run(capsys, "repo", "publish", registry.repo, bundle, "--channel", "dev", "--valid-until", "2020-01-01")
    assert (code, "is over" in err) == (2, True)
    assert run(capsys, "repo", "publish", registry.repo, bundle, "--channel", "dev", "--fallback", "later")[0] == 2
    command = ("repo", "publish", registry.repo, bundle, "--channel", "dev", "--valid-until", "+30d", "--fallback", "abstain")
    assert run(capsys, *command)[0] == 0
    _, out, _ = run(capsys, "repo", "status", registry.repo)
    line = next(line for line in out.splitlines() if "1.2.0" in line)
    assert "1.1.0" in line
    assert f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%d}" in line
    assert "then abstain" in line


def test_publish_that_waits_for_signatures_exits_1(tmp_path, capsys):
    registry = Registry(tmp_path / "w")
    registry.make(is_gated=False, targets=2, targets_threshold=2, now=TODAY)
    far = (registry.keys / "targets-2.pem").rename(registry.folder / "far.pem")
    bundle = registry.bundle()
    code, out, _ = run(capsys, "repo", "publish", registry.repo, bundle)
    assert code == 1
    for words in (
        "kws@1.0.0 will be release 1",
        "targets version 2 is not published yet: 1 more signature",
        "edgekit trust sign",
    ):
        assert words in out
    code, out, err = run(capsys, "repo", "publish", registry.repo, registry.bundle("2.0.0"), "--json")
    assert (code, json.loads(out)["info"]["counter"], "1 more signature" in err) == (1, 2, True)
    assert "not published yet" in run(capsys, "repo", "status", registry.repo)[1]
    code, out, _ = run(capsys, "repo", "publish", registry.repo, registry.bundle("3.0.0"), "--role-key", far)
    assert (code, "is release 3" in out) == (0, True)
    code, out, _ = run(capsys, "repo", "prune", registry.repo, "--keep", "1", "--keep-days", "0")
    assert (code, "waits" in out, "0 files" in out) == (1, True, True)


def test_lineage_and_audit(registry, capsys):
    code, out, _ = run(capsys, "repo", "lineage", registry.repo, "kws@1.0.0")
    assert (code, out.startswith("kws@1.0.0  manifest")) == (0, True)
    assert "├─ dev: release 1" in out
    assert json.loads(run(capsys, "repo", "lineage", registry.repo, "kws@1.0.0", "--json")[1])["placements"][1]["channel"] == (
        "staging"
    )
    code, out, _ = run(capsys, "repo", "audit", registry.repo, "--verify")
    assert (code, "5 entries; each continues the one before; the signed snapshot binds the first 5" in out) == (0, True)
    assert "gate golden=passed" in out
    log = registry.repo / "audit.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    assert run(capsys, "repo", "audit", registry.repo)[0] == 0  # what was cut off behind shows only beside the snapshot
    assert run(capsys, "repo", "audit", registry.repo, "--verify")[0] == 4
    log.write_bytes(b"".join(lines[1:]))
    assert run(capsys, "repo", "audit", registry.repo)[0] == 4


def test_prune_asks_the_fleet_and_says_what_goes(registry, capsys):
    code, _, err = run(capsys, "repo", "prune", registry.repo, "--fleet", "http://127.0.0.1:9")
    assert (code, "does not answer" in err) == (3, True)
    registry.publish("1.2.0", now=TODAY)
    command = ("repo", "prune", registry.repo, "--keep", "1", "--keep-days", "0")
    code, out, err = run(capsys, *command, "--dry-run")
    assert code == 0
    assert "would delete targets/models/kws/1.0.0/dev/" in out
    assert "no fleet server was asked" in err
    code, out, _ = run(capsys, *command, "--json")
    assert (code, [each["info"]["version"] for each in json.loads(out)["removed"]]) == (0, ["1.0.0"])
    assert run(capsys, "repo", "check", registry.repo)[0] == 0


def test_moments_that_are_none_are_refused(registry, capsys):
    for text in ("tomorrow", "+7", "7d", "2026-13-01", "+999999w"):
        code, _, err = run(capsys, "repo", "recall", registry.repo, "kws@1.1.0", "--deadline", text, "--reason", "x")
        assert (code, "not a time" in err) == (2, True), text
