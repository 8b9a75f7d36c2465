"""A target profile: what the compiler must know of the hardware it compiles for."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgekit.schema.base import SCHEMA_VERSION, Record

Arch = Literal["x86-64", "aarch64", "armv7e-m"]
RuntimeName = Literal["onnxruntime", "litert", "tflm"]


class Int8Rules(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How int8 must look to be correct and fast on this target."""

    weights: Literal["int8", "uint8"] = "int8"
    activations: Literal["uint8", "int8"] = "uint8"
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    """7-bit weights, against int16 saturation where no dot-product instruction exists."""
    format: Literal["qdq", "qoperator", "litert"] = "qdq"


class TargetBudget(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the hardware itself, checked beside the user's budget."""

    ram_mb: float | None = None
    flash_mb: float | None = None


class TargetProfile(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hardware, its instruction set, its runtime and its int8 rules.

    ``isa`` has the flags that matter to kernels: for x86-64 ``sse4_2 avx avx2 fma avx512f avx512_vnni avx_vnni amx_int8``,
    for aarch64 ``neon dotprod i8mm fp16 sve``, for armv7e-m ``dsp fpv4 fpv5``.
    ``sources`` names where each fact comes from, by field name.
    """

    name: str
    title: str
    arch: Arch
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_mb: float
    runtime: RuntimeName
    int8: Int8Rules
    channel_multiple: int
    sources: dict[str, str]
    threads: int = 1
    clock_mhz: float | None = None
    flash_mb: float | None = None
    notes: str = ""
    device_model: str = ""
    """What the firmware of this board calls itself, as a part of ``/proc/device-tree/model``; empty for generic profiles."""
    latency_table: str = ""
    """A file beside the profile with times of nodes measured on this hardware, as ``edgekit optimize`` writes it there."""
    schema_version: int = SCHEMA_VERSION
    budget: TargetBudget = msgspec.field(default_factory=TargetBudget)
