"""The supervisor and its worker: frames over a socket pair, four bytes of length and one MessagePack array each.

Both ends are the same version of the same program, so these records are no part of the schema.

The worker's life: ``Start`` → (load, self-test) → ``Ready`` or ``Failed`` → ``Go`` → serving → ``Drain`` → ``Drained``, end.
A closed link means that the supervisor is gone: the worker finishes what it has and ends.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import msgspec

from edgekit.errors import ArtifactError
from edgekit.schema.manifest import Manifest, Variant

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 4 << 20


class Frame(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Base of every frame."""


class Model(Frame, frozen=True, kw_only=True):
    """What to load: the two blobs of one variant in a slot's folder; ``variant`` names them as they lie there, opened."""

    manifest: Manifest
    variant: Variant
    blob_dir: str

    def blob(self, digest: str) -> Path:
        """The path of a blob."""
        return Path(self.blob_dir) / digest.removeprefix("sha256:")


class Start(Frame, frozen=True, kw_only=True, tag="start"):
    """First frame to a worker. Without a model it answers that it is alive and not ready, and why (``absence``)."""

    model: Model | None
    threads: int
    max_request_bytes: int
    request_timeout_s: float
    drain_s: float
    absence: str = ""


class Go(Frame, frozen=True, kw_only=True, tag="go"):
    """Begin to accept connections."""


class Drain(Frame, frozen=True, kw_only=True, tag="drain"):
    """Stop accepting, answer what is there, end."""


class Collect(Frame, frozen=True, kw_only=True, tag="collect"):
    """Ask for the figures since the last time."""

    id: int


class StatusAnswer(Frame, frozen=True, kw_only=True, tag="status_answer"):
    """The supervisor's own status as JSON, for ``GET /status``."""

    id: int
    body: bytes


class Figures(Frame, frozen=True, kw_only=True):
    """What a worker counted since it was last asked. Histograms are encoded; see ``edgekit.telemetry.histogram``."""

    requests: int = 0
    errors: int = 0
    rejected: int = 0
    samples: int = 0
    out_of_range: int = 0
    confidence_sum: float = 0.0
    confidence_count: int = 0
    bytes_in: int = 0
    latency: bytes = b""
    inference: bytes = b""
    queue: bytes = b""


class Ready(Frame, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded and answers its golden samples."""

    runtime: str = ""
    runtime_version: str = ""
    worst_error: float = 0.0
    golden_ms: float = 0.0


class Failed(Frame, frozen=True, kw_only=True, tag="failed"):
    """The model cannot be served. ``is_final``: trying again would not help."""

    code: str
    message: str
    is_final: bool


class Collected(Frame, frozen=True, kw_only=True, tag="collected"):
    """Answer to Collect."""

    id: int
    figures: Figures


class StatusRequest(Frame, frozen=True, kw_only=True, tag="status_request"):
    """A client asks for the status; the worker's own totals come along."""

    id: int
    requests: int
    errors: int


class Drained(Frame, frozen=True, kw_only=True, tag="drained"):
    """The last figures before the end."""

    figures: Figures


ToWorker = Start | Go | Drain | Collect | StatusAnswer
ToSupervisor = Ready | Failed | Collected | StatusRequest | Drained
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_to_supervisor = msgspec.msgpack.Decoder(ToSupervisor)
_encoder = msgspec.msgpack.Encoder()


def pack_frame(frame: ToWorker | ToSupervisor) -> bytes:
    """A frame with its length in front."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


async def _read(reader: asyncio.StreamReader) -> bytes | None:
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ArtifactError(
                "link.frame_too_large", f"worker link: a frame of {length} B, at most {MAX_FRAME_BYTES} B expected."
            )
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def read_to_worker(reader: asyncio.StreamReader) -> ToWorker | None:
    """The next frame for the worker; None when the supervisor is gone."""
    body = await _read(reader)
    return None if body is None else _to_worker.decode(body)


async def read_to_supervisor(reader: asyncio.StreamReader) -> ToSupervisor | None:
    """The next frame for the supervisor; None when the worker is gone.

    Raises:
        ArtifactError: ``link.malformed`` when a worker writes anything else.
    """
    body = await _read(reader)
    try:
        return None if body is None else _to_supervisor.decode(body)
    except msgspec.DecodeError as error:
        raise ArtifactError("link.malformed", f"worker link: not a frame: {error}.") from error
