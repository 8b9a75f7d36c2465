"""Parity: do the variants of a release answer alike? Proved when it is packed, on the same samples, and signed with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.sampling import OpenedModel
from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.contract import Contract
from edgekit.schema.manifest import Parity

Array = NDArray[Any]
MAX_SAMPLES = 512
MAX_DB = 200.0
"""SQNR of equal outputs."""
DEFAULT_LIMITS = {"classification": "agreement>=0.95", "other": "sqnr_db>=20"}
_LIMIT = re.compile(r"(agreement|sqnr_db)\s*>=\s*([0-9.]+)\Z")


def parse_limit(text: str) -> tuple[str, float]:
    """``agreement>=0.98`` or ``sqnr_db>=25``.

    Raises:
        UsageError: ``parity.limit``.
    """
    match = _LIMIT.match(text.strip())
    try:
        return match.group(1), float(match.group(2))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        raise UsageError(
            "parity.limit", f"--parity {text!r}: not a limit.", hint='For example "agreement>=0.98" or "sqnr_db>=25".'
        ) from None


def measure_parity(
    first: OpenedModel,
    other: OpenedModel,
    feeds: Sequence[Mapping[str, Array]],
    *,
    reference: str,
    contract: Contract,
    limit: str = "",
    data: str | None = None,
) -> Parity:
    """Run two models on the same samples.

    Args:
        first: the release's first variant.
        other: the variant that is compared with it.
        feeds: samples, each with every input.
        reference: the first variant's name.
        contract: what the outputs mean.
        limit: what has to be met; empty takes the default of the task.
        data: digest of the samples' data set, where there is one.
    """
    text = limit or DEFAULT_LIMITS[contract.task]
    name, least = parse_limit(text)
    signal = noise = 0.0
    same = rows = 0
    for each in feeds[:MAX_SAMPLES]:
        expected, got = first.run(each), other.run(each)
        for key, value in expected.items():
            power, error = _powers(value.astype(np.float64), got[key].astype(np.float64))
            signal, noise = signal + power, noise + error
        if contract.task == "classification":
            scores = next(iter(expected))
            left, right = expected[scores], got[scores]
            same += int((left.argmax(-1) == right.argmax(-1)).sum())
            rows += int(math.prod(left.shape[:-1]))
    sqnr = _decibels(signal, noise)
    agreement = same / rows if rows else None
    found = agreement if name == "agreement" else sqnr
    return Parity(
        reference=reference,
        samples=min(len(feeds), MAX_SAMPLES),
        data=data,
        sqnr_db=round(sqnr, 2),
        agreement=agreement,
        limit=text,
        is_met=found is not None and math.isfinite(noise) and found >= least,
    )


def _powers(wanted: Array, got: Array) -> tuple[float, float]:
    """Signal and noise power; values that are not finite on one side only are noise without end."""
    is_same = (wanted == got) | (np.isnan(wanted) & np.isnan(got))
    is_finite = np.isfinite(wanted) & np.isfinite(got)
    if not (is_same | is_finite).all():
        return 0.0, math.inf
    left, right = wanted[is_finite], got[is_finite]
    return float((left**2).sum()), float(((right - left) ** 2).sum())


def _decibels(signal: float, noise: float) -> float:
    """SQNR within the ends that are told: no noise is the upper one, nothing but noise the lower."""
    if noise <= 0:
        return MAX_DB
    return max(-MAX_DB, min(MAX_DB, 10 * math.log10(signal / noise))) if signal > 0 and math.isfinite(noise) else -MAX_DB


def check_parity(parity: Parity, variant: str) -> None:
    """Refuse variants that answer differently.

    Raises:
        ArtifactError: ``variant.parity``.
    """
    if parity.is_met:
        return
    agreement = f"agreement {parity.agreement:.4f}, " if parity.agreement is not None else ""
    raise ArtifactError(
        "variant.parity",
        f"variant {variant} answers otherwise than {parity.reference}: {agreement}{parity.sqnr_db:.1f} dB on {parity.samples} "
        f"samples; wanted is {parity.limit}.",
        hint="Leave it out, optimize it with a tighter budget, or set --parity.",
    )


def check_contract(first: Contract, other: Contract, variant: str) -> None:
    """One release has one contract: names, types, shapes and labels of all variants are the same.

    Raises:
        ArtifactError: ``variant.contract`` naming what differs.
    """
    pairs: list[tuple[str, object, object]] = [
        ("inputs", _tensors(first.inputs), _tensors(other.inputs)),
        ("outputs", _tensors(first.outputs), _tensors(other.outputs)),
        ("labels", first.labels, other.labels),
        ("task", first.task, other.task),
    ]
    for what, left, right in pairs:
        if left != right:
            raise ArtifactError(
                "variant.contract",
                f"variant {variant}: its {what} are {right}, the first variant's are {left}.",
                hint="Variants of one release come from the same model.",
            )


def _tensors(specs: Sequence[Any]) -> list[tuple[str, str, tuple[object, ...]]]:
    """Names, types and shapes; a free axis is free whatever it is called."""
    return [(spec.name, spec.dtype, tuple(n if isinstance(n, int) else "*" for n in spec.shape)) for spec in specs]
