"""A device that slept through many rotations catches up: each root is verified by the one before, some at a time."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest

from edgekit.errors import TrustError
from edgekit.repository.ceremony import init_repository, repository_status, rotate
from edgekit.repository.server import RepositoryServer
from edgekit.schema.state import Floors
from edgekit.trust import metadata
from edgekit.trust.repository_client import TrustedRepository

NOW = datetime.now(UTC).replace(microsecond=0)
ROTATIONS = 30


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Thirty-one roots; each brings another timestamp key, so that only the last one's verifies what is there."""
    folder = tmp_path_factory.mktemp("roots")
    init_repository(folder / "repo", keys_dir=folder / "keys", now=NOW)
    for _ in range(ROTATIONS):
        (role,) = [each for each in repository_status(folder / "repo", now=NOW).roles if each.role == "timestamp"]
        rotate(folder / "repo", "timestamp", old=role.keyids[0], new="generate", now=NOW)
    return folder / "repo"


def device(repository, server, cache):
    root = (repository / "metadata" / "1.root.json").read_bytes()
    return TrustedRepository(cache, server.url, root=root, floors=Floors(), now=NOW)


@pytest.mark.fault("F28")
@pytest.mark.parametrize("a_step", [7, 10, 30, 31])
def test_device_catches_up_with_more_roots_than_one_step_takes(repository, tmp_path, monkeypatch, a_step):
    monkeypatch.setattr(metadata, "ROOTS_A_STEP", a_step)
    with RepositoryServer(repository, "127.0.0.1", 0) as server:
        assert device(repository, server, tmp_path / "cache").refresh().floors.root == ROTATIONS + 1
        assert device(repository, server, tmp_path / "cache").refresh().floors.root == ROTATIONS + 1


@pytest.mark.fault("F28")
def test_more_roots_than_one_refresh_takes_are_followed_by_the_next(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "ROOTS_A_STEP", 4)
    monkeypatch.setattr(metadata, "MAX_STEPS", 2)
    with RepositoryServer(repository, "127.0.0.1", 0) as server:
        for tries in itertools.count(1):
            try:
                found = device(repository, server, tmp_path / "cache").refresh()
            except TrustError:
                assert tries < 6
            else:
                break
    assert found.floors.root == ROTATIONS + 1
    assert tries == 4


@pytest.mark.fault("F28")
def test_root_that_the_one_before_did_not_sign_ends_the_way(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "ROOTS_A_STEP", 7)
    forged = repository / "metadata" / "17.root.json"
    kept = forged.read_bytes()
    forged.write_bytes((repository / "metadata" / "18.root.json").read_bytes())
    try:
        with RepositoryServer(repository, "127.0.0.1", 0) as server, pytest.raises(TrustError):
            device(repository, server, tmp_path / "cache").refresh()
    finally:
        forged.write_bytes(kept)
    assert len(list((tmp_path / "cache" / "root_history").iterdir())) == 16
