"""What the agent tells systemd (``Type=notify``): that it is ready, how it is, that it is alive, that it ends.

A message is one datagram to the socket that ``NOTIFY_SOCKET`` names (sd_notify(3)); without the variable nothing is sent, and
a socket that takes nothing never disturbs the agent. The watchdog is fed only after the model server answered: a loop that
turns while nothing is served is no sign of life.

    >>> Notifier.from_environment({}).is_wanted
    False
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
_LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Notifier:
    """The way to the service manager. ``watchdog_s`` is the longest silence that it bears, 0 for any."""

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, *, pid: int | None = None) -> Notifier:
        """As sd_notify(3) and sd_watchdog_enabled(3) say; the variables of another process are not ours."""
        address = environ.get("NOTIFY_SOCKET", "")
        owner, microseconds = environ.get("WATCHDOG_PID", ""), environ.get("WATCHDOG_USEC", "")
        is_ours = owner in {"", str(os.getpid() if pid is None else pid)}
        watchdog_s = int(microseconds) / 1e6 if is_ours and microseconds.isdecimal() else 0.0
        return cls(address=address if address[:1] in {"/", "@"} else "", watchdog_s=watchdog_s)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody listens."""
        return bool(self.address)

    def send(self, *lines: str) -> None:
        """One message of ``NAME=value`` lines."""
        if not self.address:
            return
        where = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as out:
            out.sendto("\n".join(lines).encode(), where)

    def ready(self, status: str) -> None:
        """The agent serves, or answers that it has nothing to serve."""
        self.send("READY=1", f"STATUS={one_line(status)}")

    def status(self, status: str) -> None:
        """What ``systemctl status`` shows."""
        self.send(f"STATUS={one_line(status)}")

    def stopping(self) -> None:
        """The agent ends."""
        self.send("STOPPING=1", "STATUS=stopping")

    def feed(self) -> None:
        """The agent is alive."""
        self.send("WATCHDOG=1")

    async def watch(self, is_alive: Callable[[], Awaitable[bool]], describe: Callable[[], str]) -> None:
        """Feed the watchdog three times within its patience, as long as ``is_alive`` says so; tell what changed."""
        if not self.is_wanted or not self.watchdog_s:
            return
        told, is_silent = "", False
        while True:
            started = time.monotonic()
            if await is_alive():
                self.feed()
                is_silent = False
            elif not is_silent:
                is_silent = True
                logger.warning("event=watchdog_not_fed watchdog_s=%g", self.watchdog_s)
            if (text := describe()) != told:
                told = text
                self.status(text)
            await asyncio.sleep(max(0.0, self.watchdog_s / 3 - (time.monotonic() - started)))


def one_line(text: str) -> str:
    """A status has one line."""
    return " ".join(text.split())


async def answers(host: str, port: int, *, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether the model server at an address answers a request, through its real door.

    Args:
        host: where it listens; an address that means all of them is asked on loopback.
        port: of it.
        seconds: how long it may take.
    """
    where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(where, port)
            try:
                writer.write(_LIVE)
                return (await reader.readline()).startswith(b"HTTP/1.1 200")
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False
