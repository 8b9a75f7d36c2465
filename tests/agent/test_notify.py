"""Telling systemd: real datagrams to a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

import pytest

from edgekit.agent.notify import Notifier, answers
from tests.agent.world import Agent


@pytest.fixture
def manager(tmp_path):
    """What systemd is to a service: a datagram socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(20)
        yield made


def told(manager) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_messages_as_systemd_reads_them(manager, tmp_path):
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})
    assert notifier.watchdog_s == 3.0
    notifier.ready("m@1.0 serves\nat 127.0.0.1")
    notifier.feed()
    notifier.stopping()
    assert told(manager) == ["READY=1", "STATUS=m@1.0 serves at 127.0.0.1"]
    assert told(manager) == ["WATCHDOG=1"]
    assert told(manager) == ["STOPPING=1", "STATUS=stopping"]


def test_abstract_socket():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"edgekit-test-{os.getpid()}"
        manager.bind("\0" + name)
        manager.settimeout(5)
        Notifier(address="@" + name).feed()
        assert manager.recv(64) == b"WATCHDOG=1"


def test_variables_that_are_not_ours(tmp_path):
    assert Notifier.from_environment({"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}, pid=2).watchdog_s == 0
    assert not Notifier.from_environment({"NOTIFY_SOCKET": "vsock:2:1"}).is_wanted
    Notifier(address=str(tmp_path / "nobody")).feed()  # nobody listens: nothing happens


def test_watchdog_is_fed_only_while_the_server_answers(manager, tmp_path):
    notifier = Notifier(address=str(tmp_path / "notify"), watchdog_s=0.15)
    alive = [True, True, False, False, True]

    async def is_alive() -> bool:
        if not alive:
            raise asyncio.CancelledError
        return alive.pop(0)

    async def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await notifier.watch(is_alive, lambda: f"{len(alive)} to go")

    asyncio.run(run())
    manager.settimeout(0.2)
    messages = []
    while True:
        try:
            messages += told(manager)
        except TimeoutError:
            break
    assert messages.count("WATCHDOG=1") == 3
    fed = [message for message in messages if message.startswith(("WATCHDOG", "STATUS"))]
    assert fed == [
        "WATCHDOG=1",
        "STATUS=4 to go",
        "WATCHDOG=1",
        "STATUS=3 to go",
        "STATUS=2 to go",
        "STATUS=1 to go",
        "WATCHDOG=1",
        "STATUS=0 to go",
    ]


def test_server_that_takes_connections_and_answers_nothing():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert asyncio.run(answers("127.0.0.1", port, seconds=0.2)) is False
    assert asyncio.run(answers("127.0.0.1", port, seconds=0.2)) is False


def test_server_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            end, _ = server.accept()
            with end:
                end.recv(1024)
                end.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        assert asyncio.run(answers("0.0.0.0", server.getsockname()[1])) is True


def test_agent_from_its_start_to_its_end(manager, tmp_path):
    """The whole way: a real agent, as systemd would start it."""
    agent = Agent(tmp_path).start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="600000")
    try:
        first = told(manager)
        assert first[0] == "READY=1", agent.log.read_text()
        assert agent.get("/v2/health/live")[0] == 200
        seen: list[str] = []
        while seen.count("WATCHDOG=1") < 2:
            seen += told(manager)
    finally:
        assert agent.stop() == 0
    while "STOPPING=1" not in seen:
        seen += told(manager)
