from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from edgekit.durable import create_durably, make_folder, write_durably


@pytest.fixture
def events(monkeypatch):
    """Names of what is fsynced and renamed, in order."""
    seen = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        seen.append("sync new file" if name.startswith(".new-") else f"sync {name}")
        real_sync(descriptor)

    def replace(source, target, **named):
        seen.append(f"rename to {Path(target).name}")
        real_replace(source, target, **named)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_content_is_durable_before_the_name_and_the_name_before_the_return(tmp_path, events):
    write_durably(tmp_path / "a.json", [b"one", b"two"])
    assert events == ["sync new file", "rename to a.json", f"sync {tmp_path.name}"]
    assert (tmp_path / "a.json").read_bytes() == b"onetwo"
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_new_folders_are_durable_from_the_top(tmp_path, events):
    make_folder(tmp_path / "a" / "b" / "c")
    assert events == [f"sync {tmp_path.name}", "sync a", "sync b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(events) == 3


def test_failing_content_leaves_the_old_file_and_nothing_else(tmp_path):
    write_durably(tmp_path / "a", [b"old"])

    def broken():
        yield b"new"
        raise RuntimeError("source went away")

    with pytest.raises(RuntimeError):
        write_durably(tmp_path / "a", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_new_file_is_durable_before_it_has_its_name(tmp_path, events):
    create_durably(tmp_path / "k" / "a.pem", b"key", mode=0o600)
    assert events == [f"sync {tmp_path.name}", "sync new file", "sync k"]
    assert (tmp_path / "k" / "a.pem").read_bytes() == b"key"
    assert stat.S_IMODE((tmp_path / "k" / "a.pem").stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "k").iterdir()] == ["a.pem"]


@pytest.mark.parametrize("has_links", [True, False])
def test_new_file_never_replaces_one(tmp_path, monkeypatch, has_links):
    def refuse(*_args, **_named):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    create_durably(tmp_path / "a", b"old")
    (tmp_path / "b").symlink_to("nowhere")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError):
            create_durably(tmp_path / name, b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
