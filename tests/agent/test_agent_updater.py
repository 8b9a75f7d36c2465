"""The updater's rounds and the supervisor's workers: nothing is left behind, nothing spins, nobody waits for ever."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import time

import pytest

from edgekit.agent import child, workers
from edgekit.agent.child import SelfTestFailed, WorkerProcess
from edgekit.agent.config import AgentConfig
from edgekit.agent.daemon import Daemon
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.agent.slots import SlotStore
from edgekit.agent.state_store import StateStore
from edgekit.agent.steps import ReleaseRefused
from edgekit.agent.updater import Updater
from edgekit.agent.workers import Workers
from edgekit.errors import DeviceError, RepositoryError, TrustError
from tests.agent.test_agent_state import FACTS, Bench


class Waiting:
    """A proven model; says what became of it."""

    def __init__(self):
        self.calls = []

    def serve(self):
        self.calls.append("serve")

    def discard(self):
        self.calls.append("discard")


class Round:
    """An updater over a temporary state folder; the repository's part is a shelf of releases."""

    def __init__(self, folder):
        self.bench = Bench(folder)
        bench = self.bench
        self.reports = []
        self.failure = None
        self.proven = Waiting()
        outbox = Outbox(folder / "outbox.db", max_bytes=1 << 20)
        self.journal = Journal(outbox, AgentConfig(device="d", broker="mqtt://127.0.0.1:1"), "0")
        self.updater = Updater(
            bench.config, bench.store, bench.slots, self.journal, b"", self, self.facts, lambda: self.reports.append(1)
        )
        self.updater._refresh = self.refresh

    async def facts(self):
        return FACTS

    known_facts = FACTS
    ask_facts = facts

    def report(self):
        self.reports.append(1)

    async def prove(self, *_model):
        if isinstance(self.proven, Exception):
            raise self.proven
        return self.proven

    async def refresh(self):
        if self.failure:
            raise self.failure
        return self.bench.shelf, tuple(self.bench.shelf.releases)

    def poll(self):
        return asyncio.run(self.updater.poll())

    def events(self):
        return self.journal.outbox.read(kinds=("ev",))


@pytest.fixture
def round_(tmp_path):
    return Round(tmp_path / "state")


def test_release_that_failed_and_was_superseded_does_not_make_the_agent_spin(round_):
    round_.bench.shelf.publish(1)
    round_.bench.shelf.fault = RepositoryError("repository.unreachable", "cut")
    assert 0 < round_.poll() <= round_.bench.config.poll_s
    (deferral,) = round_.updater._deferred.values()
    deferral.until = time.monotonic() - 1
    round_.bench.shelf.fault = None
    round_.bench.shelf.publish(2)
    assert round_.poll() == round_.bench.config.poll_s
    assert round_.bench.store.state.floors.releases == {"m": 2}


def test_release_that_failed_and_was_then_refused_does_not_make_the_agent_spin(round_):
    round_.bench.shelf.publish(1)
    round_.bench.shelf.fault = RepositoryError("repository.unreachable", "cut")
    round_.poll()
    (deferral,) = round_.updater._deferred.values()
    deferral.until = time.monotonic() - 1
    round_.bench.shelf.fault = None
    round_.proven = SelfTestFailed(DeviceError("selftest.mismatch", "no"), is_final=True)
    assert round_.poll() == round_.bench.config.poll_s
    assert [refusal.code for refusal in round_.bench.store.state.refusals] == ["selftest.mismatch"]
    assert round_.updater._deferred == {}


def test_worker_given_up_when_the_switch_cannot_be_written(round_, monkeypatch):
    round_.bench.shelf.publish(1)
    update = StateStore.update

    def refuse_switch(self, **changes):
        if changes.get("phase") == "switch":
            raise OSError(errno.ENOSPC, "full")
        return update(self, **changes)

    monkeypatch.setattr(StateStore, "update", refuse_switch)
    round_.poll()
    assert round_.proven.calls == ["discard"]
    assert round_.updater.last_error_code == "device.disk_full"


def test_refusal_that_cannot_be_written_is_tried_later(round_, monkeypatch):
    round_.bench.shelf.publish(1)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    async def broken(*_):
        raise ReleaseRefused("selftest.mismatch", "no")

    monkeypatch.setattr(round_.updater, "_refuse", refuse)
    monkeypatch.setattr(round_.updater, "_do", broken)
    round_.poll()
    assert [deferral.code for deferral in round_.updater._deferred.values()] == ["device.disk_full"]


def test_new_reason_of_a_silent_repository_is_told_and_so_is_its_end(round_):
    def failing(error):
        round_.failure = error
        before = (len(round_.events()), len(round_.reports))
        round_.poll()
        return len(round_.events()) - before[0], len(round_.reports) - before[1]

    assert failing(RepositoryError("repository.unreachable", "gone")) == (1, 1)
    assert failing(RepositoryError("repository.unreachable", "gone")) == (0, 0)
    assert failing(TrustError("trust.expired", "old")) == (1, 1)
    assert failing(None) == (0, 1)
    assert round_.updater.last_error_code == ""


# --- workers, as real processes


def in_workers(test, crashed=None):
    async def main():
        listener = socket.create_server(("127.0.0.1", 0))
        config = AgentConfig(device="d", drain_s=0.1, request_timeout_s=0.1)
        set_ = Workers((listener,), config, lambda: b"{}", (crashed if crashed is not None else []).append)
        try:
            await asyncio.wait_for(test(set_), 30)
        finally:
            await set_.stop()
            listener.close()

    asyncio.run(main())


async def started(set_):
    worker = await set_.start(())
    await worker.wait_ready(20)
    return worker


def test_draining_worker_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(workers, "END_MARGIN_S", 0.2)

    async def test(set_):
        first, second = await started(set_), await started(set_)
        set_.switch(first)
        os.kill(first.pid, signal.SIGSTOP)
        set_.switch(second)
        await first.ended.wait()
        assert first.process.returncode == -signal.SIGKILL
        assert second.is_running

    in_workers(test)


def test_serving_worker_that_hangs_counts_as_crashed(monkeypatch):
    monkeypatch.setattr(child, "COLLECT_SECONDS", 0.1)
    monkeypatch.setattr(workers, "HUNG_SECONDS", 0.3)
    crashed = []

    async def test(set_):
        worker = await started(set_)
        set_.switch(worker)
        await set_.collect()
        assert worker.silent_s == 0
        os.kill(worker.pid, signal.SIGSTOP)
        while worker.is_running:
            await set_.collect()
        await asyncio.sleep(0.05)
        assert crashed == [worker]

    in_workers(test, crashed)


def test_figures_that_come_late_are_not_lost(monkeypatch):
    monkeypatch.setattr(child, "COLLECT_SECONDS", 0.05)

    async def test(set_):
        worker = await started(set_)
        os.kill(worker.pid, signal.SIGSTOP)
        assert await set_.collect() == []
        os.kill(worker.pid, signal.SIGCONT)
        monkeypatch.setattr(child, "COLLECT_SECONDS", 5.0)
        assert len(await set_.collect()) == 2

    in_workers(test)


def test_supervisor_without_a_process_to_spare_tries_again(tmp_path, monkeypatch):
    """A fork that fails (no memory, no process left) must not leave the agent without a worker for ever."""
    spawn, failures = WorkerProcess.spawn, [OSError(errno.EAGAIN, "no process"), OSError(errno.ENOMEM, "no memory")]

    async def reluctant(*arguments):
        if failures:
            raise failures.pop()
        return await spawn(*arguments)

    monkeypatch.setattr(WorkerProcess, "spawn", reluctant)
    monkeypatch.setattr("edgekit.agent.daemon.MAX_DELAY_S", 0.05)

    async def main():
        folder = tmp_path / "state"
        folder.mkdir()
        listener = socket.create_server(("127.0.0.1", 0))
        outbox = Outbox(folder / "o.db", max_bytes=1 << 20)
        config = AgentConfig(device="d", state_dir=str(folder), drain_s=0.1)
        daemon = Daemon(config, listener, StateStore.open(folder, device="d"), SlotStore(folder), outbox, b"")
        daemon._spawn(daemon._settle_later(0.0))
        for _ in range(400):
            await asyncio.sleep(0.05)
            if daemon.workers.current:
                break
        assert daemon.workers.current is not None
        assert not failures
        await daemon.workers.stop()

    asyncio.run(main())
