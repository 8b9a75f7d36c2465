"""What the worker answers over HTTP: the Open Inference Protocol v2, health, and the agent's status.

Every answer to an inference names exactly one model: by digest in ``parameters.model_digest`` and in the header
``edgekit-model-digest``, by version in ``model_version``.

A model whose golden samples took less than ``INLINE_MS`` runs in the event loop: a hand-over to a thread costs more than
it saves. A slower one runs in a thread of its own (the runtime gives the interpreter lock back), behind a bounded queue, so
that health checks are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from edgekit import __version__
from edgekit.agent.http import Answer, Request, error_answer
from edgekit.agent.link import Model
from edgekit.agent.meter import Meter
from edgekit.errors import DataError, EdgekitError

logger = logging.getLogger(__name__)

INLINE_MS = 5.0
MAX_QUEUED = 64
_JSON_LENGTH = b"inference-header-content-length"
_CLIENT_ERRORS = range(400, 500)
_live = Answer(status=200, body=b'{"live":true}')

StatusSource = Callable[[], Awaitable[bytes | None]]


def _not_found(path: str) -> Answer:
    return error_answer(404, f"{path}: no such resource", code="http.not_found")


def _wrong_method(request: Request, allowed: str) -> Answer:
    message = f"{request.method} {request.path}: the method must be {allowed}"
    return error_answer(405, message, code="http.wrong_method", headers=(("allow", allowed),))


@dataclass
class Service:
    """The routes. Without a model (``predictor`` None) the service is alive and not ready."""

    meter: Meter
    status: StatusSource
    predictor: Predictor | None = None
    absence: str = ""
    """Why there is no model; empty: none is installed yet."""

    def handle(self, request: Request) -> Answer | Awaitable[Answer]:
        """Route one request."""
        parts = request.path.strip("/").split("/")
        match parts:
            case ["v2", "models", name, *rest]:
                return self._model(request, name, rest)
            case _ if request.method not in {"GET", "HEAD"}:
                return _wrong_method(request, "GET") if self._get(parts) else _not_found(request.path)
            case ["status"]:
                return self._status()
            case _:
                return self._get(parts) or _not_found(request.path)

    def _get(self, parts: list[str]) -> Answer | None:
        match parts:
            case ["v2", "health", "live"]:
                return _live
            case ["v2", "health", "ready"]:
                return self._ready()
            case ["v2"]:
                extensions = ["binary_tensor_data"]
                body = {"name": "edgekit", "version": __version__, "extensions": extensions}
                return Answer(status=200, body=msgspec.json.encode(body))
            case ["status"]:
                return _live
            case _:
                return None

    def _ready(self) -> Answer:
        if self.predictor is None and self.absence:
            return error_answer(503, self.absence, code="agent.abstains", headers=(("retry-after", "60"),))
        if self.predictor is None:
            return error_answer(503, "no model is installed yet", code="agent.no_model", headers=(("retry-after", "1"),))
        return Answer(status=200, body=b'{"ready":true}')

    async def _status(self) -> Answer:
        body = await self.status()
        if body is None:
            return error_answer(503, "the supervisor does not answer", code="agent.no_supervisor")
        return Answer(status=200, body=body)

    def _model(  # noqa: PLR0911 - one return a route
        self, request: Request, name: str, rest: list[str]
    ) -> Answer | Awaitable[Answer]:
        predictor = self.predictor
        if predictor is None:
            return self._ready()
        manifest = predictor.model.manifest
        if name != manifest.name:
            return error_answer(404, f"model {name}: not served here; {manifest.name} is", code="model.unknown")
        match rest:
            case ["versions", version, *after]:
                if version != manifest.version:
                    message = f"model {name} version {version}: not served; {manifest.version} is"
                    return error_answer(404, message, code="model.unknown_version")
                rest = after
            case _:
                pass
        match rest:
            case ["infer"] if request.method == "POST":
                return predictor.infer(request)
            case ["infer"]:
                return _wrong_method(request, "POST")
            case [] | ["ready"] if request.method not in {"GET", "HEAD"}:
                return _wrong_method(request, "GET")
            case []:
                return predictor.metadata
            case ["ready"]:
                return self._ready()
            case _:
                return _not_found(request.path)


@dataclass
class _Job:
    """One inference on its way."""

    request: Request
    started: float = 0.0
    finished: float = 0.0
    feeds: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


class Predictor:
    """One loaded model and the way from an HTTP body to an HTTP body."""

    def __init__(self, model: Model, session: Any, meter: Meter, *, golden_ms: float) -> None:
        from edgekit.agent import protocol  # noqa: PLC0415 - numpy: a worker without a model stays small
        from edgekit.agent.guard import InputGuard  # noqa: PLC0415 - the same

        self.model = model
        self._session = session
        self._meter = meter
        self._protocol = protocol
        self._guard = InputGuard(model.manifest.contract)
        self._pool = None if golden_ms <= INLINE_MS else ThreadPoolExecutor(1, thread_name_prefix="model")
        self._queued = 0
        self._digest = model.variant.model
        self._headers = (("edgekit-model-digest", self._digest),)
        self.metadata = self._describe()

    def _describe(self) -> Answer:
        manifest, describe = self.model.manifest, self._protocol.describe_tensors
        body = {
            "name": manifest.name,
            "versions": [manifest.version],
            "platform": f"{self._session.runtime}_{self.model.variant.format}",
            "inputs": describe(self._session.inputs),
            "outputs": describe(self._session.outputs),
            "parameters": {
                "model_digest": self._digest,
                "precision": self.model.variant.precision,
                "labels": list(manifest.contract.labels),
                "thresholds": manifest.contract.thresholds,
            },
        }
        return Answer(status=200, body=msgspec.json.encode(body), headers=self._headers)

    def infer(self, request: Request) -> Answer | Awaitable[Answer]:
        """Answer an inference request, inline or in the model's thread."""
        job = _Job(request)
        if self._pool is None:
            return self._run(job)
        if self._queued >= MAX_QUEUED:
            message = f"{MAX_QUEUED} requests are waiting already"
            return self._counted(job, error_answer(429, message, code="agent.overloaded", headers=(("retry-after", "1"),)))
        self._queued += 1
        return self._run_in_thread(job, self._pool)

    async def _run_in_thread(self, job: _Job, pool: ThreadPoolExecutor) -> Answer:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, self._run, job)
        finally:
            self._queued -= 1

    def _run(self, job: _Job) -> Answer:
        try:
            return self._counted(job, self._predict(job))
        except DataError as error:
            return self._counted(job, error_answer(400, error.message, code=error.code))
        except EdgekitError as error:
            return self._counted(job, error_answer(500, error.message, code=error.code))
        except Exception:
            logger.exception("event=request_failed path=%s", job.request.path)
            return self._counted(job, error_answer(500, "internal error; the agent's log has the trace", code="agent.bug"))

    def _predict(self, job: _Job) -> Answer:
        length = job.request.headers.get(_JSON_LENGTH)
        if length is not None and not length.isdigit():
            raise DataError("request.malformed", f"Inference-Header-Content-Length: {length!r} is not a number.")
        request = self._protocol.decode_request(job.request.body, None if length is None else int(length))
        self._guard.check(request.feeds)
        job.feeds, job.started = request.feeds, time.monotonic()
        job.outputs = self._session.run(request.feeds)
        job.finished = time.monotonic()
        manifest = self.model.manifest
        body, json_length = self._protocol.encode_answer(
            request, job.outputs, model=manifest.name, version=manifest.version, model_digest=self._digest
        )
        if json_length is None:
            return Answer(status=200, body=body, headers=self._headers)
        headers = (*self._headers, ("inference-header-content-length", str(json_length)))
        return Answer(status=200, body=body, headers=headers, content_type="application/octet-stream")

    def _counted(self, job: _Job, answer: Answer) -> Answer:
        """Count when the answer is written: the client does not wait for our bookkeeping."""
        answer.after = lambda: self._count(job, answer.status)
        return answer

    def _count(self, job: _Job, status: int) -> None:
        received = job.request.received
        self._meter.count(
            latency_ms=(time.monotonic() - received) * 1000,
            bytes_in=len(job.request.body),
            is_error=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
            is_rejected=status in _CLIENT_ERRORS,
        )
        if not job.finished:
            return
        samples, out_of_range = self._guard.count_out_of_range(job.feeds)
        self._meter.count_run(
            inference_ms=(job.finished - job.started) * 1000,
            queue_ms=(job.started - received) * 1000,
            samples=samples,
            out_of_range=out_of_range,
        )
        self._meter.count_confidence(*self._guard.confidence(job.outputs))

    def close(self) -> None:
        """Free the model."""
        if self._pool:
            self._pool.shutdown()
        self._session.close()
