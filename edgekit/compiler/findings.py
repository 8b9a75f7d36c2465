"""What the search learned about a model, as records: the report draws them, ``report.json`` holds them.

SQNR is always against the float32 model's outputs on the same samples, in dB: ``10 log10(signal power / noise power)``.
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record

FindingKind = Literal["float-island", "unfused-pair", "conversion", "unknown-operator"]


class LayerSensitivity(Record, frozen=True, kw_only=True):
    """What quantizing one layer does to the model's answers.

    ``enable_one_db``: only this layer is int8; ``weights_only_db`` and ``activations_only_db``: only that part of it;
    ``disable_one_db``: everything but this layer is int8. None where it was not measured.
    """

    layer: str
    op_type: str
    enable_one_db: float
    weights_only_db: float | None = None
    activations_only_db: float | None = None
    disable_one_db: float | None = None
    float_ms: float | None = None
    int8_ms: float | None = None
    is_int8: bool = True
    """Whether the chosen candidate runs it in int8."""


class TensorRange(Record, frozen=True, kw_only=True):
    """One activation: the range seen, the range chosen and by which method, and the SQNR of its 8-bit values alone."""

    tensor: str
    seen_low: float
    seen_high: float
    low: float
    high: float
    method: str
    sqnr_db: float
    clipped: float
    """Share of the values outside the chosen range, 0..1."""


class LayerSaturation(Record, frozen=True, kw_only=True):
    """Sums of two neighbouring int16 products that overflow without a dot-product instruction, on calibration data.

    ``pairs`` were counted, ``overflowing`` of them left the int16 range; ``worst`` is the largest absolute sum (32,767 fits);
    ``cure`` is what the search did about it: ``none``, ``7-bit``, ``u8u8`` or ``fp32``.
    """

    layer: str
    op_type: str
    pairs: int
    overflowing: int
    worst: int
    cure: str = "none"


class AuditFinding(Record, frozen=True, kw_only=True):
    """One thing in the runtime's own graph that costs time or was not meant, and what can be done about it."""

    kind: FindingKind
    node: str
    op_type: str
    text: str
    ms: float | None = None
    """Time in it per run, where it was measured."""
    repair: str = ""


class Kernel(Record, frozen=True, kw_only=True):
    """One node of the graph that the runtime really runs; ``ms`` per run, None where it was not measured."""

    node: str
    op_type: str
    domain: str
    precision: Literal["int8", "fp32", "fp16", "conversion", "other"]
    ms: float | None = None


class RuntimeAudit(Record, frozen=True, kw_only=True):
    """The runtime's own graph of one model on this host, and what is wrong with it."""

    model: str
    kernels: tuple[Kernel, ...]
    findings: tuple[AuditFinding, ...]
    total_ms: float | None = None


class LadderStep(Record, frozen=True, kw_only=True):
    """One step of the ladder: what it changed, what it measured before and after, whether it stayed.

    ``score_db`` is the output SQNR on the ranking samples.
    """

    name: str
    is_kept: bool
    reason: str
    before_db: float | None = None
    score_db: float | None = None
    seconds: float = 0.0


class Findings(Record, frozen=True, kw_only=True):
    """Everything learned; empty parts were not looked into."""

    layers: tuple[LayerSensitivity, ...] = ()
    ranges: tuple[TensorRange, ...] = ()
    saturation: tuple[LayerSaturation, ...] = ()
    audits: dict[str, RuntimeAudit] = {}  # noqa: RUF012  msgspec copies an empty default per instance
    """By candidate."""
    ladder: tuple[LadderStep, ...] = ()
    notes: tuple[str, ...] = ()
