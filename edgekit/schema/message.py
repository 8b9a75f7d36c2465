"""The device's messages: what travels over MQTT.

Topics are ``ek/1/{site}/{device}/{verb}`` (see ``edgekit.telemetry.topics``). A payload is one MessagePack array, tagged by a
short string in its first place; fields are only ever appended, so old readers read new messages and new readers fill the
defaults. Metric values travel as one vector of little-endian float32 in the order that the birth message declares; NaN is
"no value". Every message that is stored carries (boot, seq): ``boot`` is drawn at random at agent start (63 bits), ``seq``
counts from 1 within it, and (device, boot, seq) is the server's idempotency key.

| verb | record | QoS | retained |
| --- | --- | --- | --- |
| status | Birth, and Death as the last will | 1 | yes |
| hb | Heartbeat | 0 | no |
| w | WindowBatch | 1 | no |
| ev | Event | 1 | no |
| lb | Label | 1 | no |
| x | InputSample | 1 | no |
| rep | Reported | 1 | yes |

``time_ms`` is Unix time in milliseconds, UTC.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ClockSource = Literal["system", "ntp", "unsynced"]
EventKind = Literal[
    "agent_started",
    "agent_stopped",
    "release_found",
    "install_started",
    "install_finished",
    "install_refused",
    "install_failed",
    "worker_crashed",
    "rolled_back",
    "repository_unreachable",
    "messages_dropped",
    "release_recalled",
    "release_expired",
    "delta_failed",
    "probation_started",
    "committed",
    "shadow_started",
    "shadow_finished",
    "model_hung",
    "command_received",
    "command_finished",
    "updates_paused",
    "updates_resumed",
    "contract_violated",
    "desired_refused",
    "desired_accepted",
    "precheck_failed",
    "message_refused",
    "clock_stepped",
    "certificate_renewed",
    "certificate_not_renewed",
]


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Base of every message."""


class MetricSpec(Message, frozen=True, kw_only=True):
    """One entry of the metric vector: position is its id."""

    name: str
    unit: str = ""
    kind: Literal["gauge", "count", "quantile"] = "gauge"


class SketchSpec(Message, frozen=True, kw_only=True):
    """One histogram: its name and its bin rule, for example ``log2:3`` (see ``edgekit.telemetry.histogram``)."""

    name: str
    unit: str
    bins: str


class SlotReport(Message, frozen=True, kw_only=True):
    """One slot as the fleet sees it."""

    name: str
    status: str
    model: str = ""
    version: str = ""
    counter: int = 0
    model_digest: str = ""
    manifest_digest: str = ""


class Birth(Message, frozen=True, kw_only=True, tag="birth"):
    """First message of a session: who and what the device is, and the schema of its windows."""

    boot: int
    seq: int
    time_ms: int
    metrics: tuple[MetricSpec, ...]
    sketches: tuple[SketchSpec, ...] = ()
    agent_version: str = ""
    runtime: str = ""
    runtime_version: str = ""
    arch: str = ""
    cpu: str = ""
    isa: tuple[str, ...] = ()
    cores: int = 0
    ram_mb: float = 0.0
    os: str = ""
    clock: ClockSource = "system"
    labels: dict[str, str] = {}
    url: str = ""


class Death(Message, frozen=True, kw_only=True, tag="death"):
    """The last will, or a goodbye (``is_clean``). A death of another boot than the last birth's is ignored."""

    boot: int
    is_clean: bool = False
    time_ms: int = 0


class Heartbeat(Message, frozen=True, kw_only=True, tag="hb"):
    """Sign of life; not stored as a fact, only as last seen."""

    boot: int
    seq: int
    """Highest seq that the device has given out, so that the server sees gaps."""
    time_ms: int
    outbox: int = 0


class ModelWindow(Message, frozen=True, kw_only=True):
    """One model in one window: its own figures where several serve, and its sketches.

    ``sketches`` are counts over the bins of the release's reference profile, in the order of its streams
    (``edgekit.monitor.sketch``); ``sketched`` says how many of the samples they saw.
    """

    model_digest: str
    """First 12 hex digits."""
    requests: int = 0
    samples: int = 0
    sketched: int = 0
    sketches: tuple[bytes, ...] = ()
    latency: bytes = b""
    """Where several models serve: its latencies, as the window's sketch has those of all."""
    errors: int = 0
    rejected: int = 0
    verdicts: dict[str, int] = {}
    """Exceptions that the input contract made: ``clip x.rate`` and how often."""
    labelled: int = 0
    """Predictions whose true label came in this window, and how many of them were right."""
    right: int = 0
    profile: int = 0
    """CRC-32 of the reference profile as it travelled, so that counts are never read with other bins; 0: without one."""


class Window(Message, frozen=True, kw_only=True):
    """Aggregates of one window. ``sketches`` are encoded histograms in the birth's order, empty when nothing was seen.

    Under pressure a device merges old windows: one message then stands for others, too, whose sequence numbers are in
    ``merged`` as first and last of each range. A server that has one of those already replaces it by the merged one.
    """

    seq: int
    start_ms: int
    duration_ms: int
    values: bytes
    model_digest: str = ""
    """First 12 hex digits of the model that served in the window."""
    sketches: tuple[bytes, ...] = ()
    models: tuple[ModelWindow, ...] = ()
    merged: tuple[int, ...] = ()


class WindowBatch(Message, frozen=True, kw_only=True, tag="w"):
    """Windows of one boot, oldest first; ``is_late`` when they come from the backlog."""

    boot: int
    windows: tuple[Window, ...]
    is_late: bool = False
    schema: int = 0
    """CRC-32 of the birth's metric and sketch names, so that a window is never read with another schema."""


class Event(Message, frozen=True, kw_only=True, tag="ev"):
    """Something happened. ``code`` is the stable error code for failures, ``detail`` is for people."""

    boot: int
    seq: int
    time_ms: int
    kind: EventKind
    detail: str = ""
    code: str = ""
    model: str = ""
    version: str = ""
    counter: int = 0
    fields: dict[str, str | int | float | bool] = {}


class Reported(Message, frozen=True, kw_only=True, tag="rep"):
    """The device's state as a whole; the newest (boot, seq) wins."""

    boot: int
    seq: int
    time_ms: int
    slots: tuple[SlotReport, ...]
    active: str = ""
    phase: str = "idle"
    last_error: str = ""
    last_error_code: str = ""
    refused: tuple[str, ...] = ()
    """Manifest digests that this device refuses."""
    desired_seq: int = 0
    """Of the desired state that it acted on last."""
    probation: tuple[str, ...] = ()
    """Models whose release is on probation still."""


class Label(Message, frozen=True, kw_only=True, tag="lb"):
    """The true answer to a prediction, for those that the device could not count itself, or that somebody looks into.

    ``predicted`` and ``confidence`` are set where the device still knew the prediction; it has counted those already.
    """

    boot: int
    seq: int
    time_ms: int
    model_digest: str
    """First 12 hex digits of the model that serves now."""
    prediction_id: str
    label: str
    """The class's name where the release names its classes, else its index."""
    predicted: str = ""
    confidence: float = 0.0
    is_counted: bool = False
    """Whether the device has this label in a window's ``labelled`` already."""


class SampleTensor(Message, frozen=True, kw_only=True):
    """One input of a sample: C order, little endian; ``encoding`` is empty or ``zlib``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    encoding: str = ""


class InputSample(Message, frozen=True, kw_only=True, tag="x"):
    """One live input that the device's owner agreed to give, after redaction."""

    boot: int
    seq: int
    time_ms: int
    model_digest: str
    """First 12 hex digits."""
    prediction_id: str
    tensors: tuple[SampleTensor, ...]
    predicted: str = ""
    confidence: float = 0.0
    redacted: tuple[str, ...] = ()
    """The rules that were applied."""


AnyMessage = Birth | Death | Heartbeat | WindowBatch | Event | Reported | Label | InputSample
