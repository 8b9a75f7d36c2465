"""The Open Inference Protocol, version 2: JSON requests and answers, and the binary tensor extension.

    POST /v2/models/kws/infer
    {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.0]}]}

Tensors may be flat or nested lists. With the header ``Inference-Header-Content-Length`` the JSON is followed by the raw bytes
of every input that has ``parameters.binary_data_size``; outputs come the same way where ``parameters.binary_data`` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.schema.tensor import DType, TensorSpec

Array = NDArray[Any]
MAX_RANK = 16

DATATYPES: dict[str, DType] = {
    "BOOL": "bool",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT16": "int16",
    "UINT16": "uint16",
    "INT32": "int32",
    "UINT32": "uint32",
    "INT64": "int64",
    "UINT64": "uint64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class _Input(msgspec.Struct, kw_only=True):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct, kw_only=True):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct, kw_only=True):
    inputs: list[_Input]
    id: str = ""
    outputs: list[_Output] = []
    parameters: dict[str, Any] = {}


_request_decoder = msgspec.json.Decoder(_Request)
_floats_decoder = msgspec.json.Decoder(list[float])
_any_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A decoded request: every input by name, the outputs asked for (empty: all), which of them as raw bytes."""

    feeds: dict[str, Array]
    id: str = ""
    outputs: tuple[str, ...] = ()
    binary: frozenset[str] = frozenset()
    is_all_binary: bool = False


def _malformed(message: str) -> DataError:
    return DataError("request.malformed", message, hint="See the Open Inference Protocol, version 2.")


def _tensor(entry: _Input, raw: memoryview | None) -> Array:
    dtype = DATATYPES.get(entry.datatype)
    if dtype is None:
        known = ", ".join(DATATYPES)
        raise DataError("data.dtype", f"input {entry.name}: datatype {entry.datatype!r} is none of {known}.")
    if len(entry.shape) > MAX_RANK or any(axis < 0 for axis in entry.shape):
        raise DataError("data.shape", f"input {entry.name}: shape {entry.shape} is not a shape.")
    count = math.prod(entry.shape)
    if raw is not None:
        size = count * np.dtype(dtype).itemsize
        if len(raw) != size:
            raise DataError(
                "data.shape", f"input {entry.name}: {len(raw)} B of data, shape {entry.shape} {dtype} needs {size} B."
            )
        return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).reshape(entry.shape)
    values = _values(entry, dtype)
    if values.size != count:
        raise DataError("data.shape", f"input {entry.name}: {values.size} values, shape {entry.shape} needs {count}.")
    return values.reshape(entry.shape)


def _values(entry: _Input, dtype: DType) -> Array:
    """The JSON list as an array; the flat list of floats, which is the common one, has the short way."""
    if dtype in {"float16", "float32", "float64"}:
        try:
            return np.array(_floats_decoder.decode(entry.data), dtype=dtype)
        except msgspec.DecodeError:
            pass
    try:
        listed = _any_decoder.decode(entry.data)
        source = np.asarray(listed)
    except (msgspec.DecodeError, ValueError) as error:
        raise _malformed(f"input {entry.name}: data is not a list of numbers, all rows of one length: {error}.") from error
    if source.size and source.dtype.kind not in "biuf":
        raise DataError("data.dtype", f"input {entry.name}: data holds {source.dtype.kind!r} values, expected numbers.")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.asarray(listed, dtype=dtype)
    except (OverflowError, ValueError) as error:
        raise DataError("data.dtype", f"input {entry.name}: values outside the range of {entry.datatype}: {error}.") from error
    is_whole = values.dtype.kind == "f" or dtype == "uint64" or np.array_equal(values.astype(source.dtype), source)
    if not is_whole or (dtype == "uint64" and source.size and (source.min() < 0 or (source != np.floor(source)).any())):
        raise DataError("data.dtype", f"input {entry.name}: fractions, or values outside the range of {entry.datatype}.")
    return values


def decode_request(body: bytes, header_length: int | None = None) -> InferRequest:
    """Decode an inference request.

    Args:
        body: the HTTP body.
        header_length: length of the JSON part, when raw tensors follow it.

    Raises:
        DataError: ``request.malformed``, ``data.dtype`` or ``data.shape``, naming the input.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise _malformed(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} B.")
    try:
        request = _request_decoder.decode(body if header_length is None else body[:header_length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(f"the body is not an inference request: {error}.") from error
    feeds, offset = {}, header_length or 0
    view = memoryview(body)
    for entry in request.inputs:
        size = entry.parameters.get("binary_data_size")
        raw = None
        if size is not None:
            if header_length is None or not isinstance(size, int) or not 0 <= size <= len(body) - offset:
                raise _malformed(f"input {entry.name}: binary_data_size {size!r} does not fit the body.")
            raw, offset = view[offset : offset + size], offset + size
        elif not bytes(entry.data):
            raise _malformed(f"input {entry.name}: data is missing.")
        if entry.name in feeds:
            raise _malformed(f"input {entry.name} is given twice.")
        feeds[entry.name] = _tensor(entry, raw)
    if header_length is not None and offset != len(body):
        raise _malformed(f"{len(body) - offset} B follow the last tensor.")
    return InferRequest(
        feeds=feeds,
        id=request.id,
        outputs=tuple(output.name for output in request.outputs),
        binary=frozenset(output.name for output in request.outputs if output.parameters.get("binary_data") is True),
        is_all_binary=request.parameters.get("binary_data_output") is True,
    )


def encode_answer(
    request: InferRequest,
    outputs: Mapping[str, Array],
    *,
    model: str,
    version: str,
    model_digest: str,
    prediction_id: str = "",
    input_verdicts: Sequence[str] = (),
) -> tuple[bytes, int | None]:
    """Encode the outputs.

    Args:
        request: says which outputs, and in which form.
        outputs: of the model, by name.
        model: the model's name.
        version: its version.
        model_digest: of the file that answered.
        prediction_id: what a label that comes later names.
        input_verdicts: what the input contract changed, for people.

    Returns:
        The body, and the length of its JSON part when raw tensors follow.

    Raises:
        DataError: ``request.unknown_output`` when an output is asked for that the model does not have.
    """
    names = request.outputs or tuple(outputs)
    entries, blobs = [], []
    for name in names:
        if name not in outputs:
            raise DataError("request.unknown_output", f"output {name}: the model has {', '.join(outputs)}.")
        array = outputs[name]
        entry: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": _NAMES[array.dtype.name]}  # type: ignore[index]
        if request.is_all_binary or name in request.binary:
            blobs.append(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        answer["id"] = request.id
    parameters: dict[str, Any] = {"model_digest": model_digest}
    if prediction_id:
        parameters["prediction_id"] = prediction_id
    if input_verdicts:
        parameters["input_verdicts"] = list(input_verdicts)
    body = _encoder.encode(answer | {"parameters": parameters, "outputs": entries})
    return (body, None) if not blobs else (body + b"".join(blobs), len(body))


def describe_tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    """Tensor metadata as the protocol wants it; a dynamic axis is -1."""
    return [
        {
            "name": spec.name,
            "datatype": _NAMES[spec.dtype],
            "shape": [-1 if isinstance(axis, str) else axis for axis in spec.shape],
        }
        for spec in specs
    ]
