"""scripts/deploy/backup and restore over a real database of either kind: whole or not at all, checked, over no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from tests.fleet.fleet_world import T0, birth, window, windows

DEPLOY = Path(__file__).resolve().parents[2] / "scripts" / "deploy"


def run(script: str, *words, code: int = 0, **variables: str) -> str:
    environment = os.environ | {"EDGEKIT": str(Path(sys.executable).parent / "edgekit"), "NO_COLOR": "1"} | variables
    done = subprocess.run(
        [DEPLOY / script, *map(str, words)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def filled(database_url):
    store = Store(database_url)
    messages = (birth(), windows(window(3), window(4, T0 + 10_000)))
    store.apply([Received(site="lab", device="pi-1", message=each, received_ms=T0) for each in messages])
    store.close()
    return database_url


def stored(url: str) -> tuple[int, list]:
    store = Store(url)
    try:
        series = store.series("lab", "pi-1", ["requests"], since_ms=0)
        return store.device("lab", "pi-1", T0).gaps.received, [point for line in series for point in line.points]
    finally:
        store.close()


@pytest.fixture
def empty(filled, request, tmp_path):
    """Another, empty database of the same kind."""
    if "://" not in filled:
        yield str(tmp_path / "restored.db")
        return
    server = request.getfixturevalue("postgres_server")
    server.run("CREATE DATABASE restored")
    yield server.url("restored")
    server.run("DROP DATABASE restored WITH (FORCE)")


def test_backup_is_restored_into_an_empty_database(filled, empty, tmp_path):
    authority = tmp_path / "ca"
    authority.mkdir()
    (authority / "authority.json").write_text("{}")
    made = Path(run("backup", tmp_path / "backups", DATABASE=filled, AUTHORITY=str(authority)).split()[-1])
    assert made.stat().st_mode & 0o077 == 0
    target = empty
    run("restore", made, DATABASE=target, AUTHORITY=str(tmp_path / "new-ca"))
    assert stored(target) == stored(filled)
    assert (tmp_path / "new-ca" / "authority.json").read_text() == "{}"
    assert "already" in run("restore", made, DATABASE=str(tmp_path / "x.db"), AUTHORITY=str(tmp_path / "new-ca"), code=2)
    run("restore", made, DATABASE=target, code=2)


def test_damaged_backup_is_not_restored(filled, tmp_path):
    made = Path(run("backup", tmp_path / "backups", DATABASE=filled).split()[-1])
    file = made / "database"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "damaged" in run("restore", made, DATABASE=str(tmp_path / "new.db"), code=3)
    assert not (tmp_path / "new.db").exists()
    assert "no backup" in run("restore", tmp_path, DATABASE=str(tmp_path / "new.db"), code=2)


def test_only_the_newest_backups_stay_and_a_failed_one_leaves_nothing(filled, tmp_path):
    folder = tmp_path / "backups"
    for name in ("20250101T000000Z", "20250102T000000Z", "mine"):
        (folder / name).mkdir(parents=True)
    made = Path(run("backup", folder, DATABASE=filled, KEEP="2").split()[-1])
    assert sorted(path.name for path in folder.iterdir()) == sorted(["20250102T000000Z", made.name, "mine"])
    before = sorted(folder.iterdir())
    subprocess.run([DEPLOY / "backup", folder], env=os.environ | {"DATABASE": filled, "EDGEKIT": "/bin/false"}, check=False)
    assert sorted(folder.iterdir()) == before
