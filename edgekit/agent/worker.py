"""The worker: a child process that loads the models, proves each on its golden samples, and serves them.

Started by the supervisor as ``python -m edgekit.agent.worker --link FD --listen FD [FD...] --board FD``; all descriptors are
inherited. It begins to accept connections only when the supervisor says so. It never writes to the state folder and never
talks to the network beyond the listening sockets.

It does not outlive its supervisor by more than a few seconds, even when a model hangs: a thread waits for the link's end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.agent.board import Board, Page, WatchedSession
from edgekit.agent.faults import checkpoint
from edgekit.agent.http import Limits, Server
from edgekit.agent.limits import apply_ceiling, lift_ceiling, peak_rss_mb
from edgekit.agent.link import (
    MAX_SAMPLE_BYTES,
    Collect,
    Collected,
    Compare,
    Drain,
    Drained,
    Failed,
    Figures,
    Go,
    Model,
    NextSample,
    Proof,
    Ready,
    Sample,
    Start,
    StatusAnswer,
    StatusRequest,
    TakeSample,
    ToSupervisor,
    pack_frame,
    read_to_worker,
)
from edgekit.agent.logs import start_logging
from edgekit.agent.meter import Meter
from edgekit.agent.serve import INLINE_MS, TIMEOUT_SECONDS, Predictor, Service
from edgekit.errors import ArtifactError, DeviceError, EdgekitError
from edgekit.schema.digest import CHUNK_BYTES, is_same_digest

if TYPE_CHECKING:
    from edgekit.schema.baseline import ReferenceProfile

logger = logging.getLogger(__name__)

STATUS_SECONDS = 2.0
ORPHAN_SECONDS = 2.0
ORPHAN_MARGIN_S = 0.5
TIMED_RUNS = 20
TIMED_SECONDS = 1.0
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


def load_model(model: Model, *, threads: int, is_timed: bool = False) -> tuple[Any, Proof]:
    """Load the variant and run its golden samples.

    With ``is_timed`` they are run again for a while: the fastest run says what the model takes, whatever else the device does.

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
        raise ArtifactError(
            "selftest.mismatch", f"{model.label}: the golden samples do not match on this device: {result.reason}"
        )
    if model.manifest.features is not None:
        from edgekit.evaluation.feature_parity import prove_features  # noqa: PLC0415 - only where features are declared

        prove_features(model.manifest.features, golden, session.run)
    latencies = sorted(result.latencies_ms)
    until, runs = time.monotonic() + TIMED_SECONDS, list(latencies)
    while is_timed and len(runs) < TIMED_RUNS and time.monotonic() < until:
        runs += run_golden(session, golden).latencies_ms
    golden_ms = latencies[len(latencies) // 2] if latencies else 0.0
    max_batch = 1
    if golden_ms > INLINE_MS:
        from edgekit.agent.batching import largest_batch  # noqa: PLC0415 - only for models that others wait for
        from edgekit.bundle.golden import array_of  # noqa: PLC0415 - the same

        samples = [{name: array_of(data) for name, data in sample.inputs.items()} for sample in golden.samples]
        max_batch = largest_batch(session, golden, samples, precision=variant.precision)
    return session, Proof(
        model=model.name,
        runtime=session.runtime,
        runtime_version=session.runtime_version,
        worst_error=float(result.worst_error),
        golden_ms=golden_ms,
        best_ms=min(runs, default=0.0),
        max_batch=max_batch,
    )


class Witness:
    """What follows an answer: values that are not finite are counted, and now and then one answer is copied for the shadow."""

    def __init__(self, name: str, page: Page, send: Any) -> None:
        self._name, self._page, self._send = name, page, send
        self.is_wanted = False

    def note(self, feeds: Mapping[str, Any], outputs: Mapping[str, Any], inference_ms: float) -> None:
        """After an answer was written."""
        if has_bad_output(outputs):
            self._page.note_bad_output()
        if self.is_wanted and sum(array.nbytes for array in (*feeds.values(), *outputs.values())) <= MAX_SAMPLE_BYTES:
            from edgekit.bundle.golden import tensor_data  # noqa: PLC0415 - numpy: a worker without a model stays small

            self.is_wanted = False
            inputs = {name: tensor_data(array) for name, array in feeds.items()}
            answers = {name: tensor_data(array) for name, array in outputs.items()}
            self._send(Sample(model=self._name, inputs=inputs, outputs=answers, inference_ms=inference_ms))


def has_bad_output(outputs: Mapping[str, Any]) -> bool:
    """Whether a value is not a finite number."""
    import numpy as np  # noqa: PLC0415 - a worker without a model stays small

    return any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in outputs.values())


def read_profile(model: Model) -> tuple[ReferenceProfile | None, int]:
    """The reference profile of a release, and the CRC-32 of its bytes; without one, what can be counted of a classifier anyway.

    Raises:
        DeviceError: ``slot.damaged``.
        ArtifactError: ``record.malformed``.
    """
    from edgekit.schema.base import decode_json  # noqa: PLC0415 - a worker without a model stays small
    from edgekit.schema.baseline import ReferenceProfile  # noqa: PLC0415 - the same

    ref = next((ref for ref in model.manifest.blobs if ref.role == "baseline"), None)
    if ref is None:
        from edgekit.monitor.sketch import bare_profile  # noqa: PLC0415 - the same

        return bare_profile(model.manifest.contract), 0
    digest = ref.sealed.digest if ref.sealed is not None else ref.digest
    with os.fdopen(open_blob(model.blob(digest), digest), "rb") as file:
        data = file.read()
    return decode_json(data, ReferenceProfile, name=ref.path), zlib.crc32(data)


@dataclass
class Worker:
    """The worker's loop over its link."""

    listeners: Sequence[socket.socket]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    board: Board
    request_timeout_s: float = TIMEOUT_SECONDS
    _predictors: dict[str, Predictor] = field(default_factory=dict)
    _witnesses: dict[str, Witness] = field(default_factory=dict)
    _sessions: dict[str, Any] = field(default_factory=dict)
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
        self.request_timeout_s = start.request_timeout_s
        if start.ceiling is not None:
            apply_ceiling(start.ceiling)
        if not self._load(start):
            with contextlib.suppress(ConnectionError):
                await self.writer.drain()
            return 1
        service = Service(self._status, self._predictors, absence=start.absence, absences=start.absences)
        limits = Limits(
            max_body_bytes=start.max_request_bytes,
            request_seconds=start.request_timeout_s,
            drain_seconds=start.drain_s,
            max_connections=start.max_connections,
        )
        server = Server(service.handle, limits)
        await self._follow(server, start)
        for predictor in self._predictors.values():
            predictor.close()
        return 0

    def _load(self, start: Start) -> bool:
        """Load and prove the models; what goes wrong is told to the supervisor."""
        proofs = []
        for number, model in enumerate(start.models):
            page = self.board.page(number)
            page.enter()
            checkpoint(f"load {model.label}")
            try:
                session, proof = load_model(model, threads=start.threads, is_timed=start.ceiling is not None)
                self._add(model, session, page, proof)
            except EdgekitError as error:
                code = error.code if start.ceiling is None or not _is_short_of_memory(error) else "selftest.memory"
                is_final = error.code not in TRANSIENT_CODES
                self._send(Failed(code=code, message=error.message, is_final=is_final, model=model.name))
                return False
            except Exception as error:  # a runtime may raise anything; the supervisor must hear of it
                logger.exception("event=load_failed model=%s", model.name)
                is_memory = start.ceiling is not None and _is_short_of_memory(error)
                self._send(
                    Failed(
                        code="selftest.memory" if is_memory else "selftest.failed",
                        message=f"{model.label}: {type(error).__name__}: {error}",
                        is_final=is_memory or not isinstance(error, MemoryError | OSError),
                        model=model.name,
                    )
                )
                return False
            page.cancel()
            proofs.append(proof)
        self._send(Ready(proofs=tuple(proofs), peak_rss_mb=peak_rss_mb()))
        return True

    def _add(self, model: Model, session: Any, page: Page, proof: Proof) -> None:
        watched = WatchedSession(session, page, model.label)
        try:
            profile, crc = read_profile(model)
        except EdgekitError as error:  # without figures of drift a model serves all the same
            logger.error("event=profile_unreadable model=%s error=%r", model.label, error.message)  # noqa: TRY400 - it says all
            profile, crc = None, 0
        meter = Meter(model_digest=model.variant.model, profile=profile, profile_crc=crc)
        predictor = Predictor(
            model, watched, meter, golden_ms=proof.golden_ms, max_batch=proof.max_batch, timeout_s=self.request_timeout_s
        )
        from edgekit.agent.feedback import Feedback  # noqa: PLC0415 - numpy: a worker without a model stays small

        predictor.feedback = Feedback(model=model, meter=meter, send=self._send)
        witness = Witness(model.name, page, self._send)
        predictor.on_answered = witness.note
        self._predictors[model.name], self._witnesses[model.name] = predictor, witness
        self._sessions[model.name] = session  # what the shadow answers is not counted

    def _figures(self) -> tuple[Figures, ...]:
        return tuple(predictor.meter.take() for predictor in self._predictors.values()) or (Figures(),)

    async def _follow(self, server: Server, start: Start) -> None:  # noqa: C901, PLR0912 - one case a frame
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
                    if start.ceiling is not None:
                        lift_ceiling(start.ceiling)
                    for listener in self.listeners:
                        server.start(listener)
                case Collect(id=number):
                    self._send(Collected(id=number, figures=self._figures()))
                case NextSample(model=name):
                    if name in self._witnesses:
                        self._witnesses[name].is_wanted = True
                case TakeSample(model=name) as wanted:
                    predictor = self._predictors.get(name)
                    if predictor is not None and predictor.feedback is not None:
                        predictor.feedback.wanted = wanted
                case Compare(model=name) as asked:
                    from edgekit.agent.comparison import compare  # noqa: PLC0415 - numpy

                    self._send(compare(self._sessions[name], self._predictors[name].model, asked))
                case StatusAnswer(id=number, body=body):
                    if (future := self._waiting.get(number)) and not future.done():
                        future.set_result(body)
                case Drain():
                    limit = start.drain_s + start.request_timeout_s
                    self._drain = self._drain or asyncio.ensure_future(self._drain_and_report(server, limit))
                case Start():
                    logger.error("event=second_start")

    async def _drain_and_report(self, server: Server, limit: float) -> None:
        if not await server.drain(limit_seconds=limit):
            logger.warning("event=connections_cut count=%d", len(server.connections))
        self._send(Drained(figures=self._figures()))
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def _status(self) -> bytes | None:
        """The status as the supervisor knows it now; None when it does not answer."""
        self._next_id += 1
        number, future = self._next_id, asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        meters = [predictor.meter for predictor in self._predictors.values()]
        requests, errors = sum(meter.total_requests for meter in meters), sum(meter.total_errors for meter in meters)
        self._send(StatusRequest(id=number, requests=requests, errors=errors))
        try:
            return await asyncio.wait_for(future, STATUS_SECONDS)
        except TimeoutError:
            return None
        finally:
            del self._waiting[number]


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "alloc" in str(error).lower()


def end_with(link: int) -> None:
    """End this process a moment after the link's other end is gone, whatever the rest of it does.

    The event loop notices that by itself, finishes what it has and ends; a model that hangs does not let it.
    """
    poller = select.poll()
    poller.register(link, 0)  # POLLHUP is always reported

    def wait() -> None:
        while not poller.poll():
            pass
        time.sleep(ORPHAN_SECONDS + ORPHAN_MARGIN_S)
        os._exit(1)

    threading.Thread(target=wait, name="orphan", daemon=True).start()


async def _serve(link: socket.socket, listeners: Sequence[socket.socket], board: Board) -> int:
    reader, writer = await asyncio.open_unix_connection(sock=link)
    try:
        return await Worker(listeners, reader, writer, board).run()
    finally:
        writer.close()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="edgekit.agent.worker", description="Serve models; started by the agent.")
    parser.add_argument("--link", type=int, required=True, help="inherited descriptor of the socket pair")
    parser.add_argument("--listen", type=int, nargs="+", required=True, help="inherited descriptors of the listening sockets")
    parser.add_argument("--board", type=int, nargs=2, required=True, help="inherited descriptor of the board, and its pages")
    options = parser.parse_args(arguments)
    start_logging()
    # The supervisor alone decides when a worker ends: a terminal's Ctrl-C and a service manager's SIGTERM reach both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(os.dup(options.link))
    listeners = [socket.socket(fileno=descriptor) for descriptor in options.listen]
    return asyncio.run(_serve(socket.socket(fileno=options.link), listeners, Board(*options.board)))


if __name__ == "__main__":
    sys.exit(main())
