"""Which devices a variant is for: signed rules, derived from the target that it was made for.

The order of the variants is part of the rules: a device takes the first whose rules it meets, so the most demanding come first
and what runs everywhere comes last.

>>> from edgekit.schema.manifest import Requires
>>> strictness(Requires(runtime="onnxruntime")) < strictness(Requires(runtime="onnxruntime", arch=("x86-64",), isa=("avx2",)))
True
"""

from __future__ import annotations

from edgekit.schema.artifact import ModelFormat
from edgekit.schema.manifest import Requires
from edgekit.schema.target import RuntimeName, TargetProfile

VNNI = ("avx512_vnni", "avx_vnni")
"""Either of them multiplies bytes without overflow."""
RUNTIME_OF: dict[ModelFormat, RuntimeName] = {"onnx": "onnxruntime", "tflite": "litert"}
_PORTABLE = ("fp32", "fp16")


def requires_of(
    profile: TargetProfile | None, *, precision: str, runtime: RuntimeName, runtime_version: str, ram_mb: float | None = None
) -> Requires:
    """The rules of one variant.

    Full-range int8 on x86 is only right with VNNI (without it, sums of byte products overflow 16 bits), and only fast on ARM
    with dot products; with 7-bit weights AVX2 is enough. Float models run on every processor of every architecture.

    Args:
        profile: the target that it was made for; None asks for nothing but the runtime.
        precision: the model's, for example ``int8`` or ``fp32``.
        runtime: that runs the format.
        runtime_version: that made the golden samples; its first two numbers are asked for.
        ram_mb: memory that it needs.
    """
    least = ".".join(runtime_version.split(".")[:2])
    if profile is None or precision.startswith(_PORTABLE):
        return Requires(runtime=runtime, runtime_version=least, ram_mb=ram_mb)
    vnni = tuple(flag for flag in VNNI if flag in profile.isa)
    wanted = "dotprod" if profile.arch == "aarch64" else "avx2"
    is_narrow = profile.int8.reduce_range
    isa = (wanted,) if wanted in profile.isa and (profile.arch == "aarch64" or is_narrow) else ()
    return Requires(
        runtime=runtime,
        runtime_version=least,
        arch=(profile.arch,),
        isa=isa,
        isa_any=VNNI if vnni and not is_narrow else (),
        ram_mb=ram_mb,
    )


def strictness(requires: Requires) -> int:
    """How much a variant asks for; of two, the one that asks for more comes first."""
    return 4 * bool(requires.isa_any) + 2 * len(requires.isa) + bool(requires.arch)
