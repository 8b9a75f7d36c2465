"""What is shown of a model's live data: drift by stream, quality by slice, versions beside each other.

Times are Unix milliseconds, UTC. A figure that cannot be known is null, never zero. A *stream* is one number a sample (a
column, a summary of an image, the predicted class); a *slice* is a part of the fleet: ``all``, ``site=lab``, ``arch=aarch64``,
``label.camera=dome``, ``release=2.1.0``.

>>> StreamDrift(stream="x[0]", slice="all", kind="input", effect=0.0).is_alarm
False
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record

StreamKind = Literal["input", "output", "class", "confidence", "saturation"]
FindingKind = Literal["drift", "prediction_drift", "concept_drift", "accuracy", "missing", "saturation", "contract"]
Severity = Literal["info", "warning", "critical"]


class Bin(Record, frozen=True, kw_only=True):
    """One bar of a histogram: shares of the reference and of now, each adding up to 1 with the missing ones.

    ``low`` and ``high`` are null beyond the reference's range; a class has its name in ``label`` and neither.
    """

    label: str
    """For people: ``0.2 to 0.4``, ``below 0.1``, ``missing``, a class's name."""
    reference: float
    now: float
    low: float | None = None
    high: float | None = None


class TimePoint(Record, frozen=True, kw_only=True):
    """One interval of a stream: ``effect`` is PSI with its bias taken off, ``evidence`` the detector's number, a logarithm."""

    time_ms: int
    samples: int
    effect: float | None
    evidence: float | None
    mean: float | None = None
    """Estimated from the bins' middles; null for classes."""
    missing_share: float | None = None
    out_of_range_share: float | None = None
    coverage: float | None = None
    """Time that the windows received cover, over the time that the devices known to serve the model could have covered."""


class Statistics(Record, frozen=True, kw_only=True):
    """Every statistic of the recent windows against the reference; see :mod:`edgekit.monitor.compare`."""

    samples: float
    effective_samples: float
    """After what devices and neighbouring intervals share was taken off: an estimate."""
    reference_samples: float
    psi: float | None
    jensen_shannon: float | None
    kolmogorov_smirnov: float | None
    wasserstein: float | None
    """In units of the reference's 10th to 90th percentile; null for classes."""
    chi_squared: float | None
    degrees_of_freedom: int
    p_value: float | None


class DeviceShare(Record, frozen=True, kw_only=True):
    """A device that a drift comes from: ``share`` of the evidence, 0..1, and its own effect."""

    site: str
    device: str
    share: float
    samples: int


class StreamDrift(Record, frozen=True, kw_only=True):
    """One stream in one slice."""

    stream: str
    slice: str
    kind: StreamKind
    effect: float | None
    """PSI of the recent windows with its bias taken off: 0.01 is about a tenth of a standard deviation."""
    evidence: float = 0.0
    """Natural logarithm of the detector's number; the alarm is above ``threshold``."""
    threshold: float = 0.0
    is_alarm: bool = False
    is_listed: bool = False
    """Among the streams that are likely to drift (e-BH, at most a tenth of the list false)."""
    is_inhibited: bool = False
    """It drifts, and so does the slice above it, which is the one to look at."""
    since_ms: int = 0
    """Begin of the interval in which the alarm began; 0 for none."""
    noticed_ms: int = 0
    """When the server saw it."""
    missing_share: float | None = None
    reference_missing_share: float | None = None
    out_of_range_share: float | None = None
    saturation_share: float | None = None
    """Kind ``saturation``: the share of input elements that a quantized model clips, estimated from the bins."""
    design_effect: float = 1.0
    time_effect: float = 1.0
    statistics: Statistics | None = None
    histogram: tuple[Bin, ...] = ()
    timeline: tuple[TimePoint, ...] = ()
    top_devices: tuple[DeviceShare, ...] = ()


class Finding(Record, frozen=True, kw_only=True):
    """Something that was found, for the page and for alerts."""

    kind: FindingKind
    model: str
    slice: str
    stream: str
    severity: Severity
    since_ms: int
    noticed_ms: int
    effect: float | None = None
    evidence: float | None = None
    text: str = ""


class Budget(Record, frozen=True, kw_only=True):
    """What a user asks of the watch on one model.

    ``alarms`` false ones in ``days`` over all streams and slices, on average at most; ``effect_floor`` nats a sample do not
    matter (0.002 is a sixteenth of a standard deviation, 0.005 a tenth); ``interval_s`` is the step in time.
    """

    alarms: float = 1.0
    days: float = 30.0
    effect_floor: float = 0.002
    interval_s: int = 600
    slices: tuple[str, ...] = ("site", "arch", "release")
    """``site``, ``arch``, ``release``, ``label.NAME``, ``group``."""

    def __str__(self) -> str:
        return f"{self.alarms:g} a month" if self.days == 30 else f"{self.alarms:g} in {self.days:g} days"


class Loss(Record, frozen=True, kw_only=True):
    """What the figures do not know: windows that devices gave up, that nobody can explain, and how much time is covered."""

    received: int = 0
    lost: int = 0
    missing: int = 0
    late: int = 0
    coverage: float | None = None
    silent_devices: int = 0
    """Served the model within the last day and said nothing in the newest interval: often the failed or the hot ones."""


class ProfileView(Record, frozen=True, kw_only=True):
    """The reference that is compared with."""

    model_digest: str
    crc: int
    version: str = ""
    samples: int = 0
    streams: int = 0
    source: str = ""
    is_small: bool = False
    """Below 5,000 samples: small shifts are seen late, since the reference's own error is taken off."""


class DriftPage(Record, frozen=True, kw_only=True):
    """``GET /api/v1/drift/{model}``: streams of the newest release's reference, alarms first, then by effect."""

    model: str
    now_ms: int
    since_ms: int
    budget: Budget
    streams: tuple[StreamDrift, ...] = ()
    slices: tuple[str, ...] = ()
    profile: ProfileView | None = None
    profiles: tuple[ProfileView, ...] = ()
    """All references that windows in this time were counted with."""
    frontier_ms: int = 0
    """Up to here windows are judged."""
    loss: Loss = Loss()
    watched: int = 0
    """Streams times slices."""
    note: str = ""
    """Why there is nothing to show, for people."""


class QualityPoint(Record, frozen=True, kw_only=True):
    """One interval: estimated quality before labels, realised quality from labels that came."""

    time_ms: int
    samples: int
    estimated: float | None
    estimated_low: float | None
    estimated_high: float | None
    realised: float | None
    realised_low: float | None
    realised_high: float | None
    labelled: int = 0


class SliceView(Record, frozen=True, kw_only=True):
    """Quality in one slice. ``estimated`` assumes that concepts did not drift; ``gap`` is estimated minus realised."""

    slice: str
    samples: int
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    estimated: float | None = None
    estimated_low: float | None = None
    estimated_high: float | None = None
    realised: float | None = None
    realised_low: float | None = None
    realised_high: float | None = None
    realised_weighted: float | None = None
    """Labels weighted by how rarely answers of their confidence are labelled; null where too few carry a confidence."""
    labelled: int = 0
    label_coverage: float | None = None
    label_age_ms: int | None = None
    """Median time from the prediction to its label, where both times are known."""
    gap: float | None = None
    gap_evidence: float | None = None
    """Natural logarithm of what a bet against "labelled answers are right as often as the estimate says" has won."""
    is_concept_drift: bool = False
    abstain_share: float | None = None
    drifting: int = 0
    """Streams that alarm here."""


class ClassQuality(Record, frozen=True, kw_only=True):
    """One predicted class: how often it is answered, and how often that is right by estimate."""

    label: str
    share: float
    reference_share: float
    precision_estimated: float | None
    precision_reference: float | None


class QualityPage(Record, frozen=True, kw_only=True):
    """``GET /api/v1/quality/{model}``."""

    model: str
    now_ms: int
    since_ms: int
    slices: tuple[SliceView, ...] = ()
    classes: tuple[ClassQuality, ...] = ()
    timeline: tuple[QualityPoint, ...] = ()
    assumption: str = "no concept drift"
    reference_accuracy: float | None = None
    violations: tuple[Violation, ...] = ()
    loss: Loss = Loss()
    note: str = ""


class Violation(Record, frozen=True, kw_only=True):
    """An exception that the input contract made: ``action`` is reject, clip, impute or pass."""

    action: str
    name: str
    count: int
    share: float
    """Of the samples in this time."""


class VersionView(Record, frozen=True, kw_only=True):
    """One version of a model on one class of devices (an architecture), or on all (``device_class`` is empty)."""

    version: str
    model_digest: str
    device_class: str = ""
    devices: int = 0
    requests: int = 0
    samples: int = 0
    errors: int = 0
    error_share: float | None = None
    rejected_share: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    size_bytes: int | None = None
    estimated: float | None = None
    estimated_low: float | None = None
    estimated_high: float | None = None
    realised: float | None = None
    labelled: int = 0
    drifting: int = 0
    effect: float | None = None
    """The largest effect of its input streams."""
    since_ms: int = 0
    until_ms: int = 0


class VersionsPage(Record, frozen=True, kw_only=True):
    """``GET /api/v1/models/{model}/versions``."""

    model: str
    now_ms: int
    since_ms: int
    versions: tuple[VersionView, ...] = ()
