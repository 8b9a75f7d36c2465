"""The supervisor and its worker: frames over a socket pair, four bytes of length and one MessagePack array each.

Both ends are the same version of the same program, so these records are no part of the schema.

The worker's life: ``Start`` → (load, self-test) → ``Ready`` or ``Failed`` → ``Go`` → serving → ``Drain`` → ``Drained``, end.
A worker that is told ``Compare`` instead of ``Go`` answers copies of live inputs for the shadow slot, and serves nobody.
A closed link means that the supervisor is gone: the worker finishes what it has and ends.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import msgspec

from edgekit.errors import ArtifactError
from edgekit.schema.manifest import Manifest, Variant
from edgekit.schema.message import SampleTensor
from edgekit.schema.tensor import TensorData

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 64 << 20
MAX_SAMPLE_BYTES = 16 << 20
"""A live input that is larger is never copied for the shadow slot."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Base of every frame."""


class Model(Frame, frozen=True, kw_only=True):
    """What to load: the two blobs of one variant in a slot's folder; ``variant`` names them as they lie there, opened."""

    manifest: Manifest
    variant: Variant
    blob_dir: str

    @property
    def name(self) -> str:
        """The model's name, which is its address."""
        return self.manifest.name

    @property
    def label(self) -> str:
        """Name and version, for people."""
        return f"{self.manifest.name}@{self.manifest.version}"

    def blob(self, digest: str) -> Path:
        """The path of a blob."""
        return Path(self.blob_dir) / digest.removeprefix("sha256:")


class Ceiling(Frame, frozen=True, kw_only=True):
    """What a process may use while its model proves itself: memory beyond what it has, and processor time. 0: no limit."""

    data_bytes: int = 0
    cpu_s: float = 0.0


class Start(Frame, frozen=True, kw_only=True, tag="start"):
    """First frame to a worker. Without a model it answers that it is alive and not ready, and why (``absence``).

    ``absences`` says why of single models that are missing beside those that are there. ``ceiling`` holds until ``Go``.
    """

    models: tuple[Model, ...]
    threads: int
    max_request_bytes: int
    request_timeout_s: float
    drain_s: float
    absence: str = ""
    absences: dict[str, str] = {}
    ceiling: Ceiling | None = None
    max_connections: int = 512


class Go(Frame, frozen=True, kw_only=True, tag="go"):
    """Begin to accept connections."""


class Drain(Frame, frozen=True, kw_only=True, tag="drain"):
    """Stop accepting, answer what is there, end."""


class Collect(Frame, frozen=True, kw_only=True, tag="collect"):
    """Ask for the figures since the last time."""

    id: int


class NextSample(Frame, frozen=True, kw_only=True, tag="next_sample"):
    """Send the next answer of a model, with its input: at most one is ever on its way."""

    model: str


class Compare(Frame, frozen=True, kw_only=True, tag="compare"):
    """Answer this input too, and say how it compares. ``tolerance``: relative error below which two answers agree."""

    model: str
    inputs: dict[str, TensorData]
    outputs: dict[str, TensorData]
    tolerance: float


class TakeSample(Frame, frozen=True, kw_only=True, tag="take_sample"):
    """Give one of the next inputs to the fleet, redacted; see ``edgekit.agent.samples``."""

    model: str
    redact: tuple[str, ...]
    max_bytes: int
    k_min: int = 0


class StatusAnswer(Frame, frozen=True, kw_only=True, tag="status_answer"):
    """The supervisor's own status as JSON, for ``GET /status``."""

    id: int
    body: bytes


class Figures(Frame, frozen=True, kw_only=True):
    """What a worker counted of one model since it was last asked.

    Histograms are encoded; see ``edgekit.telemetry.histogram``.
    """

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
    model_digest: str = ""
    sketches: tuple[bytes, ...] = ()
    """In the order of the reference profile's streams; see ``edgekit.monitor.sketch``."""
    sketched: int = 0
    """How many samples the sketches saw."""
    verdicts: dict[str, int] = {}
    """Exceptions that the input contract made: ``clip x.rate`` and how often."""
    labelled: int = 0
    right: int = 0
    profile: int = 0
    """CRC-32 of the reference profile; 0: without one."""


class Proof(Frame, frozen=True, kw_only=True):
    """One model's self-test. ``golden_ms`` is the median over its golden samples, ``best_ms`` the fastest of all runs."""

    model: str = ""
    runtime: str = ""
    runtime_version: str = ""
    worst_error: float = 0.0
    golden_ms: float = 0.0
    best_ms: float = 0.0
    max_batch: int = 1
    """How many requests may share a run; see ``edgekit.agent.batching``."""


class Ready(Frame, frozen=True, kw_only=True, tag="ready"):
    """Every model is loaded and answers its golden samples. ``peak_rss_mb`` is the process's so far."""

    proofs: tuple[Proof, ...] = ()
    peak_rss_mb: float = 0.0


class Failed(Frame, frozen=True, kw_only=True, tag="failed"):
    """A model (``model``, by name) cannot be served. ``is_final``: trying again would not help."""

    code: str
    message: str
    is_final: bool
    model: str = ""


class Collected(Frame, frozen=True, kw_only=True, tag="collected"):
    """Answer to Collect."""

    id: int
    figures: tuple[Figures, ...]


class Sample(Frame, frozen=True, kw_only=True, tag="sample"):
    """A live input of a model with its answer. ``inference_ms`` is what the answer took."""

    model: str
    inputs: dict[str, TensorData]
    outputs: dict[str, TensorData]
    inference_ms: float


class Compared(Frame, frozen=True, kw_only=True, tag="compared"):
    """How the shadow answered one input. ``why`` is not empty when it could not."""

    is_agreed: bool
    error: float
    confidence_delta: float
    inference_ms: float
    why: str = ""


class StatusRequest(Frame, frozen=True, kw_only=True, tag="status_request"):
    """A client asks for the status; the worker's own totals come along."""

    id: int
    requests: int
    errors: int


class Labelled(Frame, frozen=True, kw_only=True, tag="labelled"):
    """The true answer to a prediction that must travel; see ``edgekit.agent.feedback``."""

    model_digest: str
    prediction_id: str
    label: str
    predicted: str = ""
    confidence: float = 0.0
    is_counted: bool = False


class Sampled(Frame, frozen=True, kw_only=True, tag="sampled"):
    """A redacted input, as :class:`TakeSample` asked for it."""

    model_digest: str
    prediction_id: str
    tensors: tuple[SampleTensor, ...]
    predicted: str = ""
    confidence: float = 0.0
    redacted: tuple[str, ...] = ()


class Drained(Frame, frozen=True, kw_only=True, tag="drained"):
    """The last figures before the end."""

    figures: tuple[Figures, ...]


ToWorker = Start | Go | Drain | Collect | NextSample | Compare | StatusAnswer | TakeSample
ToSupervisor = Ready | Failed | Collected | Sample | Compared | StatusRequest | Drained | Labelled | Sampled
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
