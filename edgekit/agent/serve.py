"""What the worker answers over HTTP: the Open Inference Protocol v2, health, and the agent's status.

Every answer to an inference names exactly one model: by digest in ``parameters.model_digest`` and in the header
``edgekit-model-digest``, by version in ``model_version``.

A model whose golden samples took less than ``INLINE_MS`` runs in the event loop: a hand-over to a thread costs more than
it saves. A slower one runs in a thread of its own (the runtime gives the interpreter lock back), behind a bounded queue, so
that health checks are answered meanwhile; requests that wait share runs where that pays (:mod:`edgekit.agent.batching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit import __version__
from edgekit.agent.extensions import model_config, model_stats
from edgekit.agent.http import Answer, Request, error_answer
from edgekit.agent.link import Model
from edgekit.agent.meter import Meter
from edgekit.errors import DataError, EdgekitError

if TYPE_CHECKING:
    from edgekit.agent.feedback import Feedback
    from edgekit.agent.guard import GuardedFeeds, Verdict
    from edgekit.agent.protocol import InferRequest
    from edgekit.agent.streams import Prediction, Streams

logger = logging.getLogger(__name__)

INLINE_MS = 5.0
MAX_QUEUED = 64
TIMEOUT_SECONDS = 30.0
SERIES_BYTES = 6
"""Of the random part of prediction ids: one series a model and worker."""
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
    """The routes, over the models that serve, by name. Without any the service is alive and not ready."""

    status: StatusSource
    predictors: dict[str, Predictor] = field(default_factory=dict)
    absence: str = ""
    """Why there is no model at all; empty: none is installed yet."""
    absences: dict[str, str] = field(default_factory=dict)
    """Why single models are missing beside those that are there."""
    streams: Streams | None = None
    """Sensor streams, made when the first samples come."""

    def handle(  # noqa: PLR0911 - one return a route
        self, request: Request
    ) -> Answer | Awaitable[Answer]:
        """Route one request."""
        parts = request.path.strip("/").split("/")
        match parts:
            case ["v2", "models", name, *rest]:
                return self._model(request, name, rest)
            case ["v2", "streams", *rest]:
                return self._stream(request, rest)
            case ["v2", "repository", "index"] if request.method == "POST":
                return self._index()
            case ["v2", "repository", "index"]:
                return _wrong_method(request, "POST")
            case _ if request.method not in {"GET", "HEAD"}:
                return _wrong_method(request, "GET") if self._get(parts) else _not_found(request.path)
            case ["status"]:
                return self._status()
            case ["metrics"]:
                return self._metrics()
            case _:
                return self._get(parts) or _not_found(request.path)

    def _get(self, parts: list[str]) -> Answer | None:
        match parts:
            case ["v2", "health", "live"]:
                return _live
            case ["v2", "health", "ready"]:
                return self._ready()
            case ["v2"]:
                extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
                body = {"name": "edgekit", "version": __version__, "extensions": extensions}
                return Answer(status=200, body=msgspec.json.encode(body))
            case ["v2", "models"]:
                return Answer(status=200, body=msgspec.json.encode({"models": sorted(self.predictors)}))
            case ["status"] | ["metrics"]:
                return _live
            case _:
                return None

    def _index(self) -> Answer:
        """What is there, as clients of the model repository extension ask."""
        rows = [
            {"name": name, "version": predictor.model.manifest.version, "state": "READY", "reason": ""}
            for name, predictor in sorted(self.predictors.items())
        ]
        rows += [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": why} for name, why in sorted(self.absences.items())
        ]
        return Answer(status=200, body=msgspec.json.encode(rows))

    def _stream(self, request: Request, rest: list[str]) -> Answer | Awaitable[Answer]:
        """Samples of a sensor stream, or the streams that are listened to."""
        if not self.predictors:
            return self._ready()
        from edgekit.agent.streams import Streams, streams_of  # noqa: PLC0415 - numpy: a worker without a model stays small

        if self.streams is None:
            self.streams = Streams(streams_of(self.predictors.values()))
        if not rest and request.method in {"GET", "HEAD"}:
            return Answer(status=200, body=self.streams.describe())
        if request.method != "POST":
            return _wrong_method(request, "POST")
        if len(rest) not in {1, 2}:
            return _not_found(request.path)
        return self.streams.handle(request, rest[0], rest[1] if rest[1:] else "")

    def _ready(self) -> Answer:
        if self.predictors:
            return Answer(status=200, body=b'{"ready":true}')
        if self.absence:
            return error_answer(503, self.absence, code="agent.abstains", headers=(("retry-after", "60"),))
        return error_answer(503, "no model is installed yet", code="agent.no_model", headers=(("retry-after", "1"),))

    async def _status(self) -> Answer:
        body = await self.status()
        if body is None:
            return error_answer(503, "the supervisor does not answer", code="agent.no_supervisor")
        return Answer(status=200, body=body)

    async def _metrics(self) -> Answer:
        """The figures for Prometheus; without the supervisor those of this worker alone."""
        from edgekit.agent import metrics_page  # noqa: PLC0415 - only where somebody scrapes

        models = {
            (name, predictor.model.manifest.version, predictor.model.variant.model): predictor.meter
            for name, predictor in sorted(self.predictors.items())
        }
        body = metrics_page.render(models, await self.status())
        return Answer(status=200, body=body, content_type=metrics_page.CONTENT_TYPE)

    def _absent(self, name: str) -> Answer:
        """A model that is not served here, and why."""
        if name in self.absences:
            return error_answer(
                503, f"model {name}: {self.absences[name]}", code="agent.abstains", headers=(("retry-after", "60"),)
            )
        if not self.predictors:
            return self._ready()
        served = ", ".join(sorted(self.predictors))
        return error_answer(404, f"model {name}: not served here; {served} {_is_or_are(self.predictors)}", code="model.unknown")

    def _model(self, request: Request, name: str, rest: list[str]) -> Answer | Awaitable[Answer]:
        predictor = self.predictors.get(name)
        if predictor is None:
            return self._absent(name)
        match rest:
            case ["versions", version, *after]:
                served = predictor.model.manifest.version
                if version != served:
                    message = f"model {name} version {version}: not served; {served} is"
                    return error_answer(404, message, code="model.unknown_version")
                rest = after
            case _:
                pass
        return _model_route(predictor, request, rest)


def _is_or_are(names: Sized) -> str:
    return "is" if len(names) == 1 else "are"


def _model_route(  # noqa: PLR0911 - one return a route
    predictor: Predictor, request: Request, rest: list[str]
) -> Answer | Awaitable[Answer]:
    match rest:
        case ["infer"] if request.method == "POST":
            return predictor.infer(request)
        case ["infer" | "labels"]:
            return predictor.take_labels(request) if request.method == "POST" else _wrong_method(request, "POST")
        case [] | ["ready"] | ["config"] | ["stats"] if request.method not in {"GET", "HEAD"}:
            return _wrong_method(request, "GET")
        case []:
            return predictor.metadata
        case ["ready"]:
            return Answer(status=200, body=b'{"ready":true}')
        case ["config"]:
            return Answer(status=200, body=model_config(predictor))
        case ["stats"]:
            return Answer(status=200, body=model_stats(predictor))
        case _:
            return _not_found(request.path)


@dataclass
class _Job:
    """One inference on its way."""

    request: Request
    started: float = 0.0
    finished: float = 0.0
    guarded: GuardedFeeds | None = None
    feeds: Mapping[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    prediction_id: str = ""
    decoded: InferRequest | None = None
    problem: Exception | None = None
    refused: Sequence[Verdict] = ()
    done: asyncio.Future[Answer] | None = None
    is_given_up: bool = False
    """Nobody waits for it any more."""


def _resolve(job: _Job, answer: Answer) -> None:
    """In the loop's thread: hand an answer over; one that came too late is counted only by its timeout."""
    if job.done is not None and not job.done.done() and not job.is_given_up:
        job.done.set_result(answer)


def _raw_intake(model: Model) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
    """What makes the model's inputs of raw columns or images, where the release declares that and a request holds them."""
    if model.manifest.features is None:
        return None
    from edgekit.features.program import Program  # noqa: PLC0415 - numpy, and only where features are declared

    program = Program(model.manifest.features)
    if program.is_streamed:
        return None
    raw, ready = frozenset(program.raw_columns), frozenset(spec.name for spec in program.tensors)
    return lambda feeds: program.of_request(feeds) if raw >= feeds.keys() and ready != feeds.keys() else feeds


class Predictor:
    """One loaded model and the way from an HTTP body to an HTTP body."""

    def __init__(
        self,
        model: Model,
        session: Any,
        meter: Meter,
        *,
        golden_ms: float,
        max_batch: int = 1,
        timeout_s: float = TIMEOUT_SECONDS,
    ) -> None:
        from edgekit.agent import protocol  # noqa: PLC0415 - numpy: a worker without a model stays small
        from edgekit.agent.batching import Waiting  # noqa: PLC0415 - the same
        from edgekit.agent.guard import InputGuard  # noqa: PLC0415 - the same

        self.model = model
        self.session = session
        self.meter = meter
        self.on_answered: Callable[[Mapping[str, Any], Mapping[str, Any], float], None] | None = None
        """Called with feeds, outputs and the inference's milliseconds, when the answer has been written."""
        self.feedback: Feedback | None = None
        """Remembers predictions for labels that come later."""
        self._protocol = protocol
        self._guard = InputGuard(model.manifest.contract)
        self._intake = _raw_intake(model)
        self._pool = None if golden_ms <= INLINE_MS else ThreadPoolExecutor(1, thread_name_prefix="model")
        self._golden_ms, self.timeout_s, self._lock = golden_ms, timeout_s, threading.Lock()
        self.max_batch, self._waiting = max_batch, Waiting(max_batch)
        self._queued = self._answered = 0
        self._series = secrets.token_hex(SERIES_BYTES)
        self._digest = model.variant.model
        self._headers = (("edgekit-model-digest", self._digest),)
        self.metadata = self._describe()

    def _describe(self) -> Answer:
        manifest, describe = self.model.manifest, self._protocol.describe_tensors
        body = {
            "name": manifest.name,
            "versions": [manifest.version],
            "platform": f"{self.session.runtime}_{self.model.variant.format}",
            "inputs": describe(self.session.inputs),
            "outputs": describe(self.session.outputs),
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
        encoding = request.headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            message = f"content-encoding {encoding.decode('latin-1')}: not understood; send the request uncompressed"
            return self._counted(job, error_answer(415, message, code="request.encoding"))
        if self._pool is None:
            return self._run(job)
        if self._queued >= MAX_QUEUED:
            message = f"{MAX_QUEUED} requests are waiting already"
            wait = ("retry-after", str(max(1, math.ceil(MAX_QUEUED * self._golden_ms / 1000))))
            return self._counted(job, error_answer(429, message, code="agent.overloaded", headers=(wait,)))
        self._queued += 1
        return self._run_in_thread(job, self._pool)

    def take_labels(self, request: Request) -> Answer:
        """True answers to predictions that were made before."""
        if self.feedback is None:
            return _not_found(request.path)
        try:
            return Answer(status=202, body=msgspec.json.encode(self.feedback.take(request.body)), headers=self._headers)
        except DataError as error:
            return error_answer(400, error.message, code=error.code)

    async def answer_feeds(self, feeds: Mapping[str, Any]) -> Prediction:
        """Answer inputs that did not come in a request of their own: a window of a stream. Counted like a request.

        Raises:
            DataError: what the contract refuses.
            EdgekitError: what the runtime raises.
        """
        from edgekit.agent.streams import Prediction  # noqa: PLC0415 - only where there are streams

        job = _Job(Request("POST", "", {}, b"", time.monotonic(), is_keep_alive=True))
        try:
            job.guarded = self._guard.apply(feeds)
            job.feeds, job.started = job.guarded.feeds, time.monotonic()
            if self._pool is None:
                job.outputs = self.session.run(job.feeds)
            else:
                job.outputs = await asyncio.get_running_loop().run_in_executor(self._pool, self.session.run, job.feeds)
            job.finished = time.monotonic()
        except EdgekitError as error:
            for verdict in getattr(error, "verdicts", ()):
                self.meter.verdict(verdict.name, verdict.action, verdict.count)
            is_refused = isinstance(error, DataError)
            self._count(job, HTTPStatus.BAD_REQUEST if is_refused else HTTPStatus.INTERNAL_SERVER_ERROR)
            raise
        self._answered += 1
        job.prediction_id = f"{self._series}-{self._answered:x}"
        self._count(job, HTTPStatus.OK)
        verdicts = tuple(verdict.text for verdict in job.guarded.verdicts)
        return Prediction(outputs=job.outputs, id=job.prediction_id, verdicts=verdicts)

    async def _run_in_thread(self, job: _Job, pool: ThreadPoolExecutor) -> Answer:
        loop = asyncio.get_running_loop()
        job.done = loop.create_future()
        with self._lock:
            self._waiting.put(job)
        pool.submit(self._answer_waiting, loop)  # one a request: each takes a batch, or finds it taken already
        try:
            async with asyncio.timeout(self.timeout_s):
                return await asyncio.shield(job.done)
        except TimeoutError:
            job.is_given_up = True
            message = f"no answer within {self.timeout_s:g} s"
            return self._counted(job, error_answer(504, message, code="agent.timeout"))
        finally:
            self._queued -= 1

    def _answer_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the model's thread: answer the oldest request that waits, with those that can share its run."""
        with self._lock:
            batch = [job for job in self._waiting.take(self._shared_feeds) if not job.is_given_up]
        if len(batch) > 1:
            self._run_together(batch)
        for job in batch:
            answer = self._run(job)
            with contextlib.suppress(RuntimeError):  # the loop ended: nobody waits any more
                loop.call_soon_threadsafe(_resolve, job, answer)

    def _shared_feeds(self, job: _Job) -> Mapping[str, Any] | None:
        """A request's inputs, where it may share a run with others."""
        if self._waiting.max_batch < 2 or job.is_given_up:
            return None
        try:
            self._prepare(job)
        except Exception as error:  # noqa: BLE001 - its own run tells
            job.problem = error
            return None
        return job.feeds

    def _run_together(self, batch: Sequence[_Job]) -> None:
        """One run for all; when it fails each is tried alone."""
        from edgekit.agent.batching import join, split  # noqa: PLC0415 - numpy: a worker without a model stays small

        sizes = [next(iter(job.feeds.values())).shape[0] for job in batch]
        started = time.monotonic()
        try:
            parts = split(self.session.run(join([job.feeds for job in batch])), sizes)
        except Exception:
            logger.exception("event=batch_failed requests=%d", len(batch))
            return
        finished = time.monotonic()
        for job, outputs in zip(batch, parts, strict=True):
            job.outputs, job.started, job.finished = outputs, started, finished

    def _run(self, job: _Job) -> Answer:
        try:
            return self._counted(job, self._predict(job))
        except DataError as error:
            job.refused = getattr(error, "verdicts", ())
            return self._counted(job, error_answer(400, error.message, code=error.code))
        except EdgekitError as error:
            return self._counted(job, error_answer(500, error.message, code=error.code))
        except Exception:
            logger.exception("event=request_failed path=%s", job.request.path)
            return self._counted(job, error_answer(500, "internal error; the agent's log has the trace", code="agent.bug"))

    def _prepare(self, job: _Job) -> InferRequest:
        """Decode a request and judge its inputs, once."""
        if job.problem is not None:
            raise job.problem
        if job.decoded is None:
            length = job.request.headers.get(_JSON_LENGTH)
            if length is not None and not length.isdigit():
                raise DataError("request.malformed", f"Inference-Header-Content-Length: {length!r} is not a number.")
            request = self._protocol.decode_request(job.request.body, None if length is None else int(length))
            job.guarded = self._guard.apply(request.feeds if self._intake is None else self._intake(request.feeds))
            job.feeds, job.decoded = job.guarded.feeds, request
        return job.decoded

    def _predict(self, job: _Job) -> Answer:
        request = self._prepare(job)
        if not job.finished:
            job.started = time.monotonic()
            job.outputs = self.session.run(job.feeds)
            job.finished = time.monotonic()
        assert job.guarded is not None, "prepared"
        manifest = self.model.manifest
        self._answered += 1
        job.prediction_id = request.id or f"{self._series}-{self._answered:x}"
        body, json_length = self._protocol.encode_answer(
            request,
            job.outputs,
            model=manifest.name,
            version=manifest.version,
            model_digest=self._digest,
            prediction_id=job.prediction_id,
            input_verdicts=tuple(verdict.text for verdict in job.guarded.verdicts),
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
        self.meter.count(
            latency_ms=(time.monotonic() - received) * 1000,
            bytes_in=len(job.request.body),
            is_error=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
            is_rejected=status in _CLIENT_ERRORS,
        )
        for verdict in job.refused:
            self.meter.verdict(verdict.name, verdict.action, verdict.count)
        if not job.finished or job.guarded is None or status != HTTPStatus.OK:
            return
        for verdict in job.guarded.verdicts:
            self.meter.verdict(verdict.name, verdict.action, verdict.count)
        self.meter.count_run(
            inference_ms=(job.finished - job.started) * 1000,
            queue_ms=(job.started - received) * 1000,
            samples=job.guarded.samples,
            out_of_range=job.guarded.out_of_range,
        )
        self.meter.count_confidence(*self._guard.confidence(job.outputs))
        self.meter.observe(job.feeds, job.outputs)
        if self.feedback is not None:
            self.feedback.note(job.prediction_id, job.feeds, job.outputs)
        if self.on_answered is not None:
            self.on_answered(job.feeds, job.outputs, (job.finished - job.started) * 1000)

    def close(self) -> None:
        """Free the model."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.session.close()
