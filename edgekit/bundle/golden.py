"""The golden self-test: does this model, on this machine, with this runtime, still answer what it answered when it was packed?

Needs numpy only. An output y matches the expected e when |y - e| <= atol + rtol * |e| everywhere; the largest class must stay
the same wherever the expected top two differ by more than twice the tolerance.

    >>> result = run_golden(session, golden)  # doctest: +SKIP
    >>> result.is_passed, result.reason       # doctest: +SKIP
    (True, '8 of 8 golden samples match; worst at 12 % of the tolerance')
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ArtifactError, EdgekitError
from edgekit.schema.manifest import GoldenSample, GoldenSet
from edgekit.schema.tensor import TensorData

Array = NDArray[Any]


class Runner(Protocol):
    """What the self-test needs of a session (:class:`edgekit.runtime.session.Session` has it)."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name."""


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """The verdict. ``worst_error`` is the largest error in units of its tolerance: 1 is the limit."""

    is_passed: bool
    worst_error: float
    reason: str
    latencies_ms: tuple[float, ...] = ()


def tensor_data(array: Array) -> TensorData:
    """An array as data: C-contiguous, little-endian."""
    plain = np.asarray(array, order="C")
    little = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    return TensorData(dtype=plain.dtype.name, shape=tuple(plain.shape), data=little.tobytes())  # type: ignore[arg-type]


def array_of(tensor: TensorData) -> Array:
    """Data as a read-only array.

    Raises:
        ArtifactError: ``golden.malformed`` when the bytes do not make the shape.
    """
    kind = np.dtype(tensor.dtype).newbyteorder("<")
    try:
        return np.frombuffer(tensor.data, dtype=kind).reshape(tensor.shape)
    except ValueError as error:
        raise ArtifactError(
            "golden.malformed", f"a golden tensor has {len(tensor.data)} bytes, not {tensor.dtype}{list(tensor.shape)}."
        ) from error


def run_golden(session: Runner, golden: GoldenSet) -> GoldenResult:
    """Run every golden sample and compare.

    Args:
        session: the model on the device's own runtime.
        golden: the samples, with their tolerance.

    Returns:
        The verdict; a sample that the runtime refuses to run fails the test, it does not raise.

    Raises:
        ArtifactError: ``golden.empty`` or ``golden.malformed`` when the golden set itself cannot be used.
    """
    if not golden.samples:
        raise ArtifactError("golden.empty", "the bundle has no golden samples: a model cannot be tested without them.")
    _check_golden(golden)
    worst = 0.0
    latencies: list[float] = []
    for index, sample in enumerate(golden.samples):
        feeds = {name: array_of(tensor) for name, tensor in sample.inputs.items()}
        started = time.perf_counter()
        try:
            outputs = session.run(feeds)
        except EdgekitError as error:
            return _failed(index, golden, float("inf"), f"the runtime failed: {error.message}", latencies)
        latencies.append((time.perf_counter() - started) * 1000)
        error_ratio, why = compare_sample(outputs, sample, golden)
        worst = max(worst, error_ratio)
        if why:
            return _failed(index, golden, worst, why, latencies)
    count = len(golden.samples)
    reason = f"{count} of {count} golden samples match; worst at {worst:.0%} of the tolerance"
    return GoldenResult(is_passed=True, worst_error=worst, reason=reason, latencies_ms=tuple(latencies))


def _check_golden(golden: GoldenSet) -> None:
    """A set that any model would pass tests nothing."""
    if not all(math.isfinite(value) and value >= 0 for value in (golden.atol, golden.rtol)):
        raise ArtifactError(
            "golden.malformed", f"atol {golden.atol}, rtol {golden.rtol}: a tolerance is finite and not negative."
        )
    if not all(sample.outputs for sample in golden.samples):
        raise ArtifactError("golden.malformed", "a golden sample expects no output: it would match everything.")


def _failed(index: int, golden: GoldenSet, worst: float, why: str, latencies: list[float]) -> GoldenResult:
    reason = f"golden sample {index + 1} of {len(golden.samples)}: {why}"
    return GoldenResult(is_passed=False, worst_error=worst, reason=reason, latencies_ms=tuple(latencies))


def compare_sample(outputs: Mapping[str, Array], sample: GoldenSample, golden: GoldenSet) -> tuple[float, str]:
    """Compare one sample's outputs with the expected ones.

    Returns:
        The largest error in units of its tolerance, and why the sample fails (empty when it passes).
    """
    worst = 0.0
    for name, tensor in sample.outputs.items():
        expected = array_of(tensor)
        if name not in outputs:
            return float("inf"), f"the model has no output {name}"
        actual = np.asarray(outputs[name])
        if actual.shape != expected.shape:
            return float("inf"), f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
        ratio, why = _compare(name, actual.astype(np.float64), expected.astype(np.float64), golden)
        worst = max(worst, ratio)
        if why:
            return worst, why
    return worst, ""


def _compare(name: str, actual: Array, expected: Array, golden: GoldenSet) -> tuple[float, str]:
    if not expected.size:
        return 0.0, ""
    if not np.isfinite(actual).all():
        return float("inf"), f"{name} has values that are not finite"
    tolerance = golden.atol + golden.rtol * np.abs(expected)
    error = np.abs(actual - expected)
    ratios = np.divide(error, tolerance, out=np.where(error > 0, np.inf, 0.0), where=tolerance > 0)
    worst = float(ratios.max())
    if golden.is_top1_checked and (why := _other_class(name, actual, expected, golden)):
        return worst, why
    if not (error <= tolerance).all():  # also where an expected value is NaN
        place = np.unravel_index(int(ratios.argmax()), ratios.shape)
        at = f"{name}[{', '.join(str(int(i)) for i in place)}]"
        return worst, f"{at} is {actual[place]:.6g}, expected {expected[place]:.6g} ± {tolerance[place]:.3g}"
    return worst, ""


def _other_class(name: str, actual: Array, expected: Array, golden: GoldenSet) -> str:
    """Where the largest class changed although the expected top two are clearly apart."""
    if expected.ndim == 0 or expected.shape[-1] < 2:
        return ""
    rows, answers = expected.reshape(-1, expected.shape[-1]), actual.reshape(-1, expected.shape[-1])
    top_two = np.sort(rows, axis=-1)[:, -2:]
    tolerance = golden.atol + golden.rtol * np.abs(top_two).max(axis=-1)
    is_clear = top_two[:, 1] - top_two[:, 0] > 2 * tolerance
    wanted, given = rows.argmax(axis=-1), answers.argmax(axis=-1)
    bad = np.flatnonzero(is_clear & (wanted != given))
    return f"{name} says class {given[bad[0]]}, expected {wanted[bad[0]]}" if bad.size else ""
