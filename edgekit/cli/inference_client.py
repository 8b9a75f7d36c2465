"""A client of a running agent: the Open Inference Protocol v2 over HTTP, JSON tensors, standard library only.

>>> client = InferenceClient("http://127.0.0.1:8080", "fashion")   # doctest: +SKIP
>>> client.describe().inputs                                        # doctest: +SKIP
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from edgekit.agent.protocol import DATATYPES
from edgekit.dataset.data import Array
from edgekit.errors import DataError, DeviceError, EdgekitError, EnvironmentFault, UsageError
from edgekit.loopback import is_loopback
from edgekit.schema.tensor import TensorSpec

TIMEOUT_SECONDS = 30.0
MAX_ANSWER_BYTES = 64 << 20
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the agent says of its model."""

    name: str
    version: str
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    thresholds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer: the outputs, and the model that gave them."""

    outputs: dict[str, Array]
    version: str
    digest: str


class InferenceClient:
    """Asks one model of one agent. A proxy is never used for loopback.

    Args:
        url: ``http://host:port``.
        model: the model's name there.

    Raises:
        UsageError: ``agent.bad_url``.
    """

    def __init__(self, url: str, model: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("agent.bad_url", f"{url}: expected http://HOST:PORT.", hint="For example http://127.0.0.1:8080")
        self._url = url.rstrip("/")
        self._model = model
        handlers = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname) else []
        self._opener = urllib.request.build_opener(*handlers)

    def describe(self) -> ServedModel:
        """Ask for the model's inputs, outputs and class names.

        Raises:
            UsageError: ``model.unknown`` when it is not served there.
            EnvironmentFault: ``agent.unreachable``.
            DeviceError: ``agent.refused`` or ``agent.bad_answer``.
        """
        answer = self._ask(f"/v2/models/{urllib.parse.quote(self._model, safe='')}")
        try:
            parameters = answer.get("parameters") or {}
            return ServedModel(
                name=str(answer["name"]),
                version=str((answer.get("versions") or [""])[0]),
                digest=str(parameters.get("model_digest", "")),
                inputs=tuple(_spec(entry) for entry in answer["inputs"]),
                outputs=tuple(_spec(entry) for entry in answer["outputs"]),
                labels=tuple(str(label) for label in parameters.get("labels", ())),
                thresholds={str(label): float(score) for label, score in parameters.get("thresholds", {}).items()},
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._bad_answer(f"its description of {self._model} is not complete: {error!r}") from error

    def infer(self, feeds: Mapping[str, Array]) -> Answered:
        """Send one batch; errors as :meth:`describe`, and ``DataError`` when the agent refuses the data."""
        inputs = [
            {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype.name], "data": array.ravel().tolist()}  # type: ignore[index]
            for name, array in feeds.items()
        ]
        body = json.dumps({"inputs": inputs}, allow_nan=False).encode()
        answer = self._ask(f"/v2/models/{urllib.parse.quote(self._model, safe='')}/infer", body)
        try:
            outputs = {str(entry["name"]): _array(entry) for entry in answer["outputs"]}
            parameters = answer.get("parameters") or {}
            version, digest = str(answer.get("model_version", "")), str(parameters.get("model_digest", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._bad_answer(f"not an inference answer: {error!r}") from error
        return Answered(outputs=outputs, version=version, digest=digest)

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        url = self._url + path
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})  # noqa: S310 - http(s) only
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                data = response.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            text = f"{self._url}: no agent answers there: {reason}."
            raise EnvironmentFault("agent.unreachable", text, hint='Start it with "edgekit agent run".') from error
        if len(data) > MAX_ANSWER_BYTES:
            raise self._bad_answer(f"an answer larger than {MAX_ANSWER_BYTES} bytes")
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise self._bad_answer("not JSON") from error
        if not isinstance(answer, dict):
            raise self._bad_answer(f"JSON, but {type(answer).__name__} in the place of an object")
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> EdgekitError:
        try:
            said = json.loads(error.read(MAX_ANSWER_BYTES))
            message, code = str(said["error"]), str(said.get("code", "agent.refused"))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            message, code = f"HTTP {error.code} {error.reason}", "agent.refused"
        text = f"{self._url}: {message.rstrip('.')}."
        match error.code:
            case 404:
                return UsageError("model.unknown", text, hint="Give the served model's name with --model.")
            case 400 | 413:
                return DataError(code, text)
            case _:
                return DeviceError(code, text, hint='See "edgekit agent status".')

    def _bad_answer(self, what: str) -> DeviceError:
        return DeviceError("agent.bad_answer", f"{self._url}: {what}.", hint="Is it an Open Inference Protocol v2 server?")


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    axes = [int(axis) for axis in entry["shape"]]
    names = ["batch", *(f"axis{i}" for i in range(1, len(axes)))]
    shape = tuple(axis if axis >= 0 else name for axis, name in zip(axes, names, strict=True))
    return TensorSpec(name=str(entry["name"]), dtype=DATATYPES[entry["datatype"]], shape=shape)


def _array(entry: Mapping[str, Any]) -> Array:
    dtype = np.dtype(DATATYPES[entry["datatype"]])
    shape = cast("list[int]", entry["shape"])
    return np.array(entry["data"], dtype=dtype).reshape(shape)
