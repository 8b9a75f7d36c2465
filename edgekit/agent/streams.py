"""Sensor streams on the device: samples in, predictions of the windows that they complete out.

    POST /v2/streams/motor          or /v2/streams/motor/left-pump, a stream of its own for each sensor
    {"columns": ["t", "ax", "ay"], "rows": [[17.00, 0.1, 0.2], [17.01, 0.1, null]]}

Samples may also come as an inference request of the Open Inference Protocol, one input [n] a column, raw bytes included (for
whole nanoseconds: INT64). A window is computed by :mod:`edgekit.features`, as in training, and answered by the model as any
request: the contract's guard, the counters, one model digest, a prediction id of its own.

What is kept is one matrix for each stream (longest window and what may come late), for at most ``MAX_STREAMS`` streams; the
one that was quiet for longest makes room. A new worker, after a swap of the model or a restart, starts its streams anew: of
each the windows that had begun are lost, at most one length of the longest window, and the first ones are counted as
incomplete.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.agent.http import Answer, Request, error_answer
from edgekit.agent.protocol import DATATYPES, decode_request
from edgekit.errors import DataError, EdgekitError
from edgekit.features.program import Program
from edgekit.features.stream import FeatureWindow, StreamWindows

if TYPE_CHECKING:
    from edgekit.agent.serve import Predictor

logger = logging.getLogger(__name__)
Array = NDArray[Any]

MAX_STREAMS = 64
"""For each model."""
MAX_WINDOWS = 512
"""Of one push: more would keep other requests waiting."""
YIELD_SECONDS = 0.01
"""How long windows are answered before others get their turn."""
_NAMES: dict[str, str] = {dtype: name for name, dtype in DATATYPES.items()}
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class _Rows(msgspec.Struct, kw_only=True):
    columns: list[str] = []
    rows: list[list[float | None] | dict[str, float | None]] = []
    inputs: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Rows)
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The model's answer to one window."""

    outputs: Mapping[str, Array]
    id: str
    verdicts: Sequence[str] = ()


@dataclass(kw_only=True)
class StreamModel:
    """A model that is fed by a stream."""

    name: str
    version: str
    digest: str
    program: Program
    ask: Callable[[dict[str, Array]], Awaitable[Prediction]]
    """Answers one window's inputs; raises :class:`~edgekit.errors.DataError` for what its contract refuses."""
    streams: OrderedDict[str, StreamWindows] = field(default_factory=OrderedDict)
    evicted: int = 0

    @property
    def stream_name(self) -> str:
        """The name that samples are sent to."""
        assert self.program.stream is not None
        return self.program.stream.name

    def stream(self, sensor: str) -> StreamWindows:
        """The sensor's stream, the least recently used one making room."""
        if sensor in self.streams:
            self.streams.move_to_end(sensor)
            return self.streams[sensor]
        if len(self.streams) >= MAX_STREAMS:
            self.streams.popitem(last=False)
            self.evicted += 1
        made = self.streams[sensor] = StreamWindows(self.program)
        return made


@dataclass(frozen=True, kw_only=True)
class WindowAnswer:
    """One window and what the model said of it; ``error`` where its contract refused it or it could not run."""

    model: StreamModel
    window: FeatureWindow
    prediction: Prediction | None
    error: EdgekitError | None = None


def streams_of(predictors: Iterable[Predictor]) -> list[StreamModel]:
    """The models that are fed by a stream."""
    found = []
    for predictor in predictors:
        manifest = predictor.model.manifest
        program = Program(manifest.features) if manifest.features is not None else None
        if program is not None and program.is_streamed:
            found.append(
                StreamModel(
                    name=manifest.name,
                    version=manifest.version,
                    digest=predictor.model.variant.model,
                    program=program,
                    ask=predictor.answer_feeds,
                )
            )
    return found


class Streams:
    """The streams of all models of one worker. Used from one event loop."""

    def __init__(self, models: Sequence[StreamModel]) -> None:
        self._models = list(models)

    @property
    def names(self) -> list[str]:
        """Names of the streams that are listened to."""
        return sorted({model.stream_name for model in self._models})

    def describe(self) -> bytes:
        """The streams and the columns that each takes, as JSON."""
        rows = [
            {
                "name": model.stream_name,
                "model_name": model.name,
                "columns": model.program.raw_columns,
                "sensors": len(model.streams),
            }
            for model in self._models
        ]
        return _encoder.encode({"streams": rows})

    async def handle(self, request: Request, name: str, sensor: str) -> Answer:
        """Answer a request that brings samples."""
        length = request.headers.get(b"inference-header-content-length")
        if length is not None and not length.isdigit():
            text = f"Inference-Header-Content-Length: {length!r} is not a number."
            return error_answer(400, text, code="request.malformed")
        try:
            body = await self.answer(name, sensor, request.body, None if length is None else int(length))
        except DataError as error:
            return error_answer(404 if error.code == "stream.unknown" else 400, error.message, code=error.code)
        except Exception:
            logger.exception("event=stream_failed stream=%s", name)
            return error_answer(500, "internal error; the agent's log has the trace", code="agent.bug")
        return Answer(status=200, body=body)

    async def push(self, name: str, sensor: str, columns: Mapping[str, Array]) -> list[WindowAnswer]:
        """Take samples, oldest first; answer every window that they complete, for every model of the stream.

        Args:
            name: of the stream, as the release declares it.
            sensor: which of several; empty is one as any other.
            columns: every column [n], the time among them where there is one.

        Raises:
            DataError: ``stream.unknown``, ``stream.sensor``, ``stream.too_long``, or what does not fit the declaration; then
                no model took any of it.
        """
        listening = self._listening(name, sensor)
        count = min((len(array) for array in columns.values() if array.ndim), default=0)
        for model in listening:
            if count > MAX_WINDOWS * model.program.hop:
                text = f'stream "{name}": {count} samples at once make more than {MAX_WINDOWS} windows.'
                raise DataError("stream.too_long", text, hint=f"Push at most {MAX_WINDOWS * model.program.hop} at once.")
        for model in listening[1:]:
            model.stream(sensor).check(columns)
        pushed = [(model, window) for model in listening for window in model.stream(sensor).push(columns)]
        answers, since = [], time.monotonic()
        for model, window in pushed:
            try:
                answers.append(WindowAnswer(model=model, window=window, prediction=await model.ask(window.inputs)))
            except EdgekitError as error:
                answers.append(WindowAnswer(model=model, window=window, prediction=None, error=error))
            if time.monotonic() - since > YIELD_SECONDS:
                await asyncio.sleep(0)
                since = time.monotonic()
        return answers

    def _listening(self, name: str, sensor: str) -> list[StreamModel]:
        found = [model for model in self._models if model.stream_name == name]
        if not found:
            known = ", ".join(self.names) or "none"
            raise DataError("stream.unknown", f'there is no stream "{name}"; the models here listen to: {known}.')
        if sensor and not _ID.match(sensor):
            raise DataError("stream.sensor", f"{sensor!r}: not a name of a sensor; letters, digits and . _ -, at most 64.")
        return found

    async def answer(self, name: str, sensor: str, body: bytes, header_length: int | None) -> bytes:
        """The body of an answer to the body of a request.

        Raises:
            DataError: ``request.malformed``, or as :meth:`push`.
        """
        columns = decode_samples(body, header_length)
        answers = await self.push(name, sensor, columns)
        counters = {
            model.name: asdict(model.stream(sensor).counters) | {"evicted": model.evicted}
            for model in self._listening(name, sensor)
        }
        encoded = [_encode(answer) for answer in answers]
        return _encoder.encode({"stream": name, "sensor": sensor, "windows": encoded, "counters": counters})


def decode_samples(body: bytes, header_length: int | None = None) -> dict[str, Array]:
    """Columns of a request's body.

    Raises:
        DataError: ``request.malformed``, or what :func:`edgekit.agent.protocol.decode_request` refuses.
    """
    try:
        read = _decoder.decode(body if header_length is None else body[:header_length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = '{"columns": ["t", "x"], "rows": [[0.0, 1.5]]}, or an inference request with one input a column.'
        raise DataError("request.malformed", f"the body holds no samples: {error}.", hint=hint) from error
    if bytes(read.inputs):
        return {name: array.reshape(-1) for name, array in decode_request(body, header_length).feeds.items()}
    names = read.columns or (list(read.rows[0]) if read.rows and isinstance(read.rows[0], dict) else [])
    if not names or len(set(names)) != len(names):
        raise DataError("request.malformed", 'the body names no columns, or one twice; expected "columns" and "rows".')
    rows: list[list[float | None]] = []
    for number, row in enumerate(read.rows):
        values = [row.get(name) for name in names] if isinstance(row, dict) else row
        if len(values) != len(names):
            raise DataError("request.malformed", f"row {number} has {len(values)} values for {len(names)} columns.")
        rows.append(values)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))  # None becomes NaN
    return {name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(names)}


def _encode(answer: WindowAnswer) -> dict[str, Any]:
    model, window = answer.model, answer.window
    body: dict[str, Any] = {
        "start": window.start_s,
        "end": window.end_s,
        "model_name": model.name,
        "model_version": model.version,
    }
    parameters: dict[str, Any] = {"model_digest": model.digest}
    if answer.prediction is None:
        assert answer.error is not None
        return body | {"error": answer.error.message, "code": answer.error.code, "parameters": parameters}
    parameters["prediction_id"] = answer.prediction.id
    if answer.prediction.verdicts:
        parameters["input_verdicts"] = list(answer.prediction.verdicts)
    return body | {"parameters": parameters, "outputs": [_tensor(*item) for item in answer.prediction.outputs.items()]}


def _tensor(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "datatype": _NAMES[array.dtype.name], "shape": array.shape, "data": array.ravel().tolist()}
