"""The worker: a child process that loads one model, proves it on its golden samples, and serves it.

Started by the supervisor as ``python -m edgekit.agent.worker --link FD --listen FD``; both descriptors are inherited. It begins
to accept connections only when the supervisor says so. It never writes to the state folder and never talks to the network
beyond the listening socket.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.agent.http import Limits, Server
from edgekit.agent.link import (
    Collect,
    Collected,
    Drain,
    Drained,
    Failed,
    Go,
    Model,
    Ready,
    Start,
    StatusAnswer,
    StatusRequest,
    ToSupervisor,
    pack_frame,
    read_to_worker,
)
from edgekit.agent.logs import start_logging
from edgekit.agent.meter import Meter
from edgekit.agent.serve import Predictor, Service
from edgekit.errors import ArtifactError, DeviceError, EdgekitError
from edgekit.schema.digest import CHUNK_BYTES, is_same_digest

logger = logging.getLogger(__name__)

STATUS_SECONDS = 2.0
ORPHAN_SECONDS = 2.0
TRANSIENT_CODES = frozenset({"slot.damaged"})


def open_blob(path: Path, digest: str) -> int:
    """Open a blob for reading and hash the open descriptor, so that nobody can swap the file afterwards.

    Raises:
        DeviceError: ``slot.damaged`` when it is missing, a link, or hashes to something else.
    """
    hint = "The agent falls back to the other slot, and fetches the release again."
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError("slot.damaged", f"{path}: {error.strerror}; expected the blob {digest}.", hint=hint) from error
    state = hashlib.sha256()
    while chunk := os.read(descriptor, CHUNK_BYTES):
        state.update(chunk)
    os.lseek(descriptor, 0, os.SEEK_SET)
    found = "sha256:" + state.hexdigest()
    if not is_same_digest(found, digest):
        os.close(descriptor)
        raise DeviceError("slot.damaged", f"{path}: its digest is {found}, the manifest says {digest}.", hint=hint)
    return descriptor


def load_model(model: Model, *, threads: int) -> tuple[Any, Ready]:
    """Load the variant and run its golden samples.

    Raises:
        ArtifactError: ``selftest.mismatch`` when an output differs, or what the runtime raises.
        DeviceError: ``slot.damaged``.
    """
    from edgekit.bundle.golden import run_golden  # noqa: PLC0415 - numpy: a worker without a model stays small
    from edgekit.runtime.registry import open_session  # noqa: PLC0415 - the same
    from edgekit.runtime.session import SessionOptions  # noqa: PLC0415 - the same
    from edgekit.schema.base import decode_msgpack  # noqa: PLC0415 - the same
    from edgekit.schema.manifest import GoldenSet  # noqa: PLC0415 - the same

    variant = model.variant
    with os.fdopen(open_blob(model.blob(variant.golden), variant.golden), "rb") as file:
        golden = decode_msgpack(file.read(), GoldenSet, name="golden samples")
    descriptor = open_blob(model.blob(variant.model), variant.model)
    try:
        path = Path(f"/proc/self/fd/{descriptor}")
        session = open_session(path, format=variant.format, options=SessionOptions(threads=threads))
    finally:
        os.close(descriptor)
    result = run_golden(session, golden)
    if not result.is_passed:
        name = f"{model.manifest.name}@{model.manifest.version}"
        raise ArtifactError("selftest.mismatch", f"{name}: the golden samples do not match on this device: {result.reason}")
    latencies = sorted(result.latencies_ms)
    golden_ms = latencies[len(latencies) // 2] if latencies else 0.0
    return session, Ready(
        runtime=session.runtime,
        runtime_version=session.runtime_version,
        worst_error=float(result.worst_error),
        golden_ms=golden_ms,
    )


@dataclass
class Worker:
    """The worker's loop over its link."""

    listener: socket.socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    meter: Meter = field(default_factory=Meter)
    _waiting: dict[int, asyncio.Future[bytes]] = field(default_factory=dict)
    _next_id: int = 0
    _drain: asyncio.Task[None] | None = None

    def _send(self, frame: ToSupervisor) -> None:
        if not self.writer.is_closing():
            self.writer.write(pack_frame(frame))

    async def run(self) -> int:
        """Serve until drained, or until the supervisor is gone.

        Returns:
            The exit code.
        """
        start = await read_to_worker(self.reader)
        if not isinstance(start, Start):
            return 1
        service = self._prepare(start)
        if service is None:
            with contextlib.suppress(ConnectionError):
                await self.writer.drain()
            return 1
        limits = Limits(
            max_body_bytes=start.max_request_bytes, request_seconds=start.request_timeout_s, drain_seconds=start.drain_s
        )
        server = Server(service.handle, limits)
        await self._follow(server, drain_limit=start.drain_s + start.request_timeout_s)
        if service.predictor:
            service.predictor.close()
        return 0

    def _prepare(self, start: Start) -> Service | None:
        """Load and prove the model; what goes wrong is told to the supervisor."""
        if start.model is None:
            self._send(Ready())
            return Service(self.meter, self._status, absence=start.absence)
        try:
            session, ready = load_model(start.model, threads=start.threads)
            predictor = Predictor(start.model, session, self.meter, golden_ms=ready.golden_ms)
        except EdgekitError as error:
            self._send(Failed(code=error.code, message=error.message, is_final=error.code not in TRANSIENT_CODES))
            return None
        except Exception as error:  # a runtime may raise anything; the supervisor must hear of it
            logger.exception("event=load_failed")
            message = f"{type(error).__name__}: {error}"
            self._send(Failed(code="selftest.failed", message=message, is_final=not isinstance(error, MemoryError | OSError)))
            return None
        self._send(ready)
        return Service(self.meter, self._status, predictor)

    async def _follow(self, server: Server, *, drain_limit: float) -> None:
        """Do what the supervisor says until the end."""
        while True:
            read = asyncio.ensure_future(read_to_worker(self.reader))
            waits: set[asyncio.Future[Any]] = {read} | ({self._drain} if self._drain else set())
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                read.cancel()
                return
            match read.result():
                case None:
                    await server.drain(limit_seconds=ORPHAN_SECONDS)
                    return
                case Go():
                    server.start(self.listener)
                case Collect(id=number):
                    self._send(Collected(id=number, figures=self.meter.take()))
                case StatusAnswer(id=number, body=body):
                    if (future := self._waiting.get(number)) and not future.done():
                        future.set_result(body)
                case Drain():
                    self._drain = self._drain or asyncio.ensure_future(self._drain_and_report(server, drain_limit))
                case Start():
                    logger.error("event=second_start")

    async def _drain_and_report(self, server: Server, limit: float) -> None:
        if not await server.drain(limit_seconds=limit):
            logger.warning("event=connections_cut count=%d", len(server.connections))
        self._send(Drained(figures=self.meter.take()))
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def _status(self) -> bytes | None:
        """The status as the supervisor knows it now; None when it does not answer."""
        self._next_id += 1
        number, future = self._next_id, asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send(StatusRequest(id=number, requests=self.meter.total_requests, errors=self.meter.total_errors))
        try:
            return await asyncio.wait_for(future, STATUS_SECONDS)
        except TimeoutError:
            return None
        finally:
            del self._waiting[number]


async def _serve(link: socket.socket, listener: socket.socket) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=link)
    try:
        return await Worker(listener, reader, writer).run()
    finally:
        writer.close()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="edgekit.agent.worker", description="Serve one model; started by the agent.")
    parser.add_argument("--link", type=int, required=True, help="inherited descriptor of the socket pair")
    parser.add_argument("--listen", type=int, required=True, help="inherited descriptor of the listening socket")
    options = parser.parse_args(arguments)
    start_logging()
    # The supervisor alone decides when a worker ends: a terminal's Ctrl-C and a service manager's SIGTERM reach both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return asyncio.run(_serve(socket.socket(fileno=options.link), socket.socket(fileno=options.listen)))


if __name__ == "__main__":
    sys.exit(main())
