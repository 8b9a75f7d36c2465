"""Ask a running agent from Python: the Open Inference Protocol v2 over TCP or a Unix socket, tensors as raw bytes.

    >>> client = Client("unix:///run/edgekit/agent.sock")         # doctest: +SKIP
    >>> answer = client.predict("kws", {"x": features})            # doctest: +SKIP
    >>> answer.outputs["scores"], answer.model_digest              # doctest: +SKIP

One connection is kept open. A call that meets a swap of the model, a full queue or an agent without a model yet is tried again
for ``patience_s``: asking a model twice does no harm. Where nobody listens it fails at once. A client belongs to one thread;
make one for each. A proxy is never used.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.agent.protocol import DATATYPES
from edgekit.errors import DataError, DeviceError, EdgekitError, EnvironmentFault, UsageError
from edgekit.schema.tensor import TensorSpec

Array = NDArray[Any]
TIMEOUT_SECONDS = 30.0
PATIENCE_SECONDS = 10.0
MAX_HEAD_BYTES = 64 << 10
MAX_ANSWER_BYTES = 256 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
_NAMES = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}
_TRY_AGAIN = frozenset({429, 503})
FINAL_CODES = frozenset({"agent.abstains"})
"""A model that was taken out of service does not come back by waiting."""
_OK = range(200, 300)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the agent says of a model."""

    name: str
    version: str
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    thresholds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer, and exactly one model that gave it.

    ``prediction_id`` is what a label that comes later names; ``input_verdicts`` say what the input contract changed.
    """

    outputs: dict[str, Array]
    model: str
    version: str
    model_digest: str
    prediction_id: str = ""
    input_verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class _Address:
    """Where the agent is: a path, or host and port."""

    url: str
    path: str = ""
    host: str = ""
    port: int = 0
    is_tls: bool = False
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> _Address:
        parts = urllib.parse.urlsplit(url)
        hint = "For example http://127.0.0.1:8080, or unix:///run/edgekit/agent.sock."
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError("agent.bad_url", f"{url}: {error}.", hint=hint) from error
        if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
            return cls(url, path=parts.path)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError("agent.bad_url", f"{url}: expected http://HOST:PORT or unix:///PATH.", hint=hint)
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/")
        return cls(url.rstrip("/"), host=parts.hostname, port=port or (443 if is_tls else 80), is_tls=is_tls, prefix=prefix)

    @property
    def authority(self) -> str:
        """For the Host header."""
        return "localhost" if self.path else f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, seconds: float) -> socket.socket:
        """A connected socket."""
        if self.path:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                line.settimeout(seconds)
                line.connect(self.path)
            except BaseException:
                line.close()
                raise
            return line
        line = socket.create_connection((self.host, self.port), timeout=seconds)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return ssl.create_default_context().wrap_socket(line, server_hostname=self.host) if self.is_tls else line


@dataclass
class Client:
    """A client of one agent.

    Args:
        url: ``http://HOST:PORT``, ``https://…`` or ``unix:///PATH``.
        timeout_s: for a whole call, tries included.
        patience_s: for how long a call is tried again that found a full queue, no model, or a connection that ended.

    Raises:
        UsageError: ``agent.bad_url``.
    """

    url: str = "http://127.0.0.1:8080"
    timeout_s: float = TIMEOUT_SECONDS
    patience_s: float = PATIENCE_SECONDS
    _address: _Address = field(init=False)
    _line: socket.socket | None = None

    def __post_init__(self) -> None:
        self._address = _Address.parse(self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next call opens another."""
        if self._line is not None:
            self._line.close()
            self._line = None

    # --- what an agent can be asked

    def predict(
        self,
        model: str,
        feeds: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        prediction_id: str = "",
    ) -> Prediction:
        """Run a model.

        Args:
            model: its name.
            feeds: every input by name, of the model's types and shapes.
            version: refuse another one; empty takes the one that serves.
            outputs: the ones that are wanted; empty for all.
            prediction_id: a name of your own for this prediction; empty lets the agent give one.

        Raises:
            DataError: the agent refuses the data, naming the input.
            UsageError: ``model.unknown`` or ``model.unknown_version``.
            DeviceError: the agent could not answer, ``agent.overloaded`` among others.
            EnvironmentFault: ``agent.unreachable``.
        """
        head, blobs = _encode(feeds, outputs, prediction_id)
        path = f"/v2/models/{urllib.parse.quote(model, safe='')}"
        path += f"/versions/{urllib.parse.quote(version, safe='')}" if version else ""
        headers = f"inference-header-content-length: {len(head)}\r\ncontent-type: application/octet-stream\r\n"
        reply = self._ask("POST", f"{path}/infer", b"".join((head, *blobs)), headers)
        try:
            return _decode(reply)
        except (KeyError, TypeError, ValueError, AttributeError, msgspec.DecodeError) as error:
            raise self._bad_answer(f"not an inference answer: {error!r}") from error

    def describe(self, model: str) -> ServedModel:
        """A model's inputs, outputs and class names; errors as :meth:`predict`."""
        reply = self._ask("GET", f"/v2/models/{urllib.parse.quote(model, safe='')}")
        try:
            found = json.loads(reply.body)
            parameters = found.get("parameters") or {}
            return ServedModel(
                name=str(found["name"]),
                version=str((found.get("versions") or [""])[0]),
                digest=str(parameters.get("model_digest", "")),
                inputs=tuple(_spec(entry) for entry in found["inputs"]),
                outputs=tuple(_spec(entry) for entry in found["outputs"]),
                labels=tuple(str(label) for label in parameters.get("labels", ())),
                thresholds={str(label): float(score) for label, score in parameters.get("thresholds", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._bad_answer(f"its description of {model} is not complete: {error!r}") from error

    def models(self) -> tuple[str, ...]:
        """Names of the models that serve; errors as :meth:`predict`."""
        reply = self._ask("POST", "/v2/repository/index", b"{}")
        try:
            return tuple(str(row["name"]) for row in json.loads(reply.body) if row.get("state") == "READY")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._bad_answer(f"not a list of models: {error!r}") from error

    def is_ready(self) -> bool:
        """Whether a model serves now; False where nobody answers, too. It does not wait."""
        try:
            return (
                self._exchange(self._request("GET", "/v2/health/ready", b"", ""), time.monotonic() + self.timeout_s).status
                == 200
            )
        except (OSError, EOFError, EnvironmentFault):
            self.close()
            return False

    # --- the way there and back

    def _request(self, method: str, path: str, body: bytes, headers: str) -> bytes:
        address = self._address
        length = f"content-length: {len(body)}\r\n" if method == "POST" else ""
        return f"{method} {address.prefix}{path} HTTP/1.1\r\nhost: {address.authority}\r\n{length}{headers}\r\n".encode() + body

    def _ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> _Reply:
        """Ask until there is an answer, or the time is over."""
        request = self._request(method, path, body, headers)
        started, pause = time.monotonic(), FIRST_PAUSE_S
        deadline, patience = started + self.timeout_s, started + min(self.timeout_s, self.patience_s)
        while True:
            wait = pause
            problem: EdgekitError
            try:
                reply = self._exchange(request, deadline)
            except (OSError, EOFError) as error:
                self.close()
                problem = self._unreachable(error)
            else:
                if reply.status in _OK:
                    return reply
                problem = self._refusal(reply)
                if reply.status not in _TRY_AGAIN or problem.code in FINAL_CODES:
                    raise problem
                wait = _pause_of(reply, pause)
            if time.monotonic() + wait >= patience:
                raise problem
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _connected(self, deadline: float) -> socket.socket:
        """The open connection, or a new one where the agent closed it meanwhile."""
        line = self._line
        if line is not None and select.select([line], [], [], 0)[0]:  # nothing was asked: only its end can be there
            self.close()
            line = None
        if line is None:
            try:
                line = self._line = self._address.connect(max(0.001, deadline - time.monotonic()))
            except OSError as error:
                raise self._unreachable(error) from error
        return line

    def _exchange(self, request: bytes, deadline: float) -> _Reply:
        """One request and its answer."""
        line = self._connected(deadline)
        line.settimeout(max(0.001, deadline - time.monotonic()))
        line.sendall(request)
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD_BYTES:
                raise self._bad_answer(f"a head of more than {MAX_HEAD_BYTES} bytes")
            data += _receive(line, 65536)
        status, headers = self._head(bytes(data[:end]))
        if status < 200:
            raise self._bad_answer(f"an interim answer ({status})")
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_ANSWER_BYTES:
            raise self._bad_answer(f"an answer of length {length or 'unknown'}, at most {MAX_ANSWER_BYTES} bytes are read")
        body = data[end + 4 :]
        while len(body) < int(length):
            body += _receive(line, min(1 << 20, int(length) - len(body)))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return _Reply(status, headers, bytes(body))

    def _head(self, head: bytes) -> tuple[int, dict[str, str]]:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdigit():
            raise self._bad_answer(f"not HTTP: {first[:60]!r}")
        pairs = (line.partition(":") for line in lines)
        return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    # --- what went wrong

    def _refusal(self, reply: _Reply) -> EdgekitError:
        try:
            said = json.loads(reply.body)
            message, code = str(said["error"]), str(said.get("code", "agent.refused"))
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code = f"HTTP {reply.status}", "agent.refused"
        text = f"{self._address.url}: {message.rstrip('.')}."
        match reply.status:
            case 404:
                code = code if code.startswith("model.") else "model.unknown"
                return UsageError(code, text, hint="Give the name of a model that is served there.")
            case 400 | 413:
                return DataError(code, text)
            case _:
                return DeviceError(code, text, hint='See "edgekit agent status".')

    def _bad_answer(self, what: str) -> DeviceError:
        self.close()
        hint = "Is it an Open Inference Protocol v2 server?"
        return DeviceError("agent.bad_answer", f"{self._address.url}: {what}.", hint=hint)

    def _unreachable(self, error: BaseException) -> EnvironmentFault:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        text = f"{self._address.url}: no agent answers there: {reason}."
        return EnvironmentFault("agent.unreachable", text, hint='Start it with "edgekit agent run".')


def _pause_of(reply: _Reply, pause: float) -> float:
    """Seconds to wait, as the agent asks for it, and not longer than a second."""
    asked = reply.headers.get("retry-after", "")
    return min(float(asked) if asked.isdigit() else pause, LONGEST_PAUSE_S)


def _receive(line: socket.socket, count: int) -> bytes:
    data = line.recv(count)
    if not data:
        raise EOFError("the connection ended before the answer did")
    return data


def _encode(feeds: Mapping[str, Array], outputs: Sequence[str], prediction_id: str) -> tuple[bytes, list[bytes]]:
    entries, blobs = [], []
    for name, value in feeds.items():
        array = np.ascontiguousarray(value)
        datatype = _NAMES.get(array.dtype.newbyteorder("="))
        if datatype is None:
            raise DataError("data.dtype", f"input {name}: {array.dtype} is none of {', '.join(DATATYPES.values())}.")
        blob = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        blobs.append(blob)
        entries.append(
            {"name": name, "shape": array.shape, "datatype": datatype, "parameters": {"binary_data_size": len(blob)}}
        )
    request: dict[str, Any] = {"inputs": entries, "parameters": {"binary_data_output": True}}
    if prediction_id:
        request["id"] = prediction_id
    if outputs:
        request["outputs"] = [{"name": name} for name in outputs]
    return msgspec.json.encode(request), blobs


def _decode(reply: _Reply) -> Prediction:
    length = reply.headers.get("inference-header-content-length")
    end = len(reply.body) if length is None else int(length)
    found = msgspec.json.decode(reply.body[:end])
    parameters = found.get("parameters") or {}
    outputs: dict[str, Array] = {}
    for entry in found["outputs"]:
        dtype = np.dtype(DATATYPES[entry["datatype"]])
        size = (entry.get("parameters") or {}).get("binary_data_size")
        if size is None:
            outputs[str(entry["name"])] = np.array(entry["data"], dtype=dtype).reshape(entry["shape"])
            continue
        raw = np.frombuffer(reply.body, dtype=dtype.newbyteorder("<"), count=size // dtype.itemsize, offset=end)
        outputs[str(entry["name"])] = raw.astype(dtype, copy=False).reshape(entry["shape"])
        end += size
    return Prediction(
        outputs=outputs,
        model=str(found.get("model_name", "")),
        version=str(found.get("model_version", "")),
        model_digest=str(parameters.get("model_digest", "")),
        prediction_id=str(parameters.get("prediction_id", found.get("id", ""))),
        input_verdicts=tuple(str(verdict) for verdict in parameters.get("input_verdicts", ())),
    )


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    axes = [int(axis) for axis in entry["shape"]]
    names = ["batch", *(f"axis{i}" for i in range(1, len(axes)))]
    shape = tuple(axis if axis >= 0 else name for axis, name in zip(axes, names, strict=True))
    return TensorSpec(name=str(entry["name"]), dtype=DATATYPES[entry["datatype"]], shape=shape)
