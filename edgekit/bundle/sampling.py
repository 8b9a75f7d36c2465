"""Make golden samples: run the model on the runtime, choose telling samples, and derive a tolerance that is stated with them.

The tolerance answers one question: how far may the same model's outputs lie apart on another machine that works correctly?
What this machine can show of that is measured (the runtime with and without its graph optimizations, with 1..n threads) and
taken with a margin; what it cannot show (other kernels on other CPUs) is covered by a documented floor. The reason goes into
the bundle as text, with its figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.golden import tensor_data
from edgekit.errors import ArtifactError, DataError
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.manifest import GoldenSample, GoldenSet

Array = NDArray[Any]
Feeds = dict[str, Array]

MAX_TRIED = 128
"""Samples that are run to choose from."""
MARGIN = 4.0
"""Times the deviation that was measured here."""
WIDEST_SHARE = 0.5
"""A tolerance above this share of the outputs' span tests nothing."""
_INT8_STEPS = 8
_FP16_SHARE, _FP32_SHARE = 1e-2, 1e-4
_RTOL = {"int8": 0.0, "fp16": 1e-2, "fp32": 1e-4}


class Samples(Protocol):
    """What is needed of a data set: every input by name, axis 0 is the sample (``edgekit.dataset.data.Dataset`` has it)."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The inputs."""

    def __len__(self) -> int:
        """The number of samples."""


class OpenedModel(Protocol):
    """What is needed of a session."""

    @property
    def runtime(self) -> str:
        """The runtime's name."""

    @property
    def runtime_version(self) -> str:
        """The runtime's version."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every output by name."""

    def close(self) -> None:
        """Free the model."""


class ModelOpener(Protocol):
    """Opens the model that is packed, on its runtime."""

    def __call__(self, *, threads: int, is_optimized: bool) -> OpenedModel:
        """A new session."""


@dataclass(frozen=True, kw_only=True)
class GoldenMade:
    """The golden set, and the runtime that answered."""

    golden: GoldenSet
    runtime: str
    runtime_version: str


def make_golden(
    open_model: ModelOpener, contract: Contract, *, samples: Samples | None, precision: str, count: int, threads: int, seed: int
) -> GoldenMade:
    """Make a golden set.

    Args:
        open_model: opens the model.
        contract: its inputs, their ranges, and the task.
        samples: real samples; without them inputs are drawn within the contract's ranges, and the reason says so.
        precision: the model's, for the tolerance's floor.
        count: golden samples to keep.
        threads: the largest number of threads to try.
        seed: for drawn inputs.

    Raises:
        DataError: ``data.missing_input`` or ``data.empty``.
        ArtifactError: ``golden.not_finite`` or ``golden.unstable`` when the model's own answers do not allow a test.
    """
    tried = list(sample_feeds(contract, samples, count=max(count, MAX_TRIED) if samples else count, seed=seed))
    reference = open_model(threads=1, is_optimized=True)
    try:
        answers = [reference.run(feeds) for feeds in tried]
        name, version = reference.runtime, reference.runtime_version
    finally:
        reference.close()
    finite = [i for i, answer in enumerate(answers) if all(np.isfinite(value).all() for value in answer.values())]
    if not finite:
        raise ArtifactError(
            "golden.not_finite", "the model answers every sample with values that are not finite.", hint="Optimize it again."
        )
    is_classifier = contract.task == "classification"
    chosen = [finite[i] for i in _choose([answers[i] for i in finite], count, is_classifier=is_classifier)]
    feeds, expected = [tried[i] for i in chosen], [answers[i] for i in chosen]
    deviation, conditions = _deviation(open_model, feeds, expected, threads)
    atol, rtol, reason = derive_tolerance(expected, deviation, precision=precision, conditions=conditions)
    source = "real samples" if samples else "inputs drawn within the contract's ranges, no data was given"
    golden = GoldenSet(
        samples=tuple(
            GoldenSample(
                inputs={key: tensor_data(value) for key, value in given.items()},
                outputs={key: tensor_data(value) for key, value in answer.items()},
            )
            for given, answer in zip(feeds, expected, strict=True)
        ),
        atol=atol,
        rtol=rtol,
        is_top1_checked=is_classifier,
        tolerance_reason=f"{reason} Samples: {len(feeds)} {source}; {name} {version}.",
    )
    return GoldenMade(golden=golden, runtime=name, runtime_version=version)


def sample_feeds(contract: Contract, samples: Samples | None, *, count: int, seed: int) -> Iterator[Feeds]:
    """Up to ``count`` feeds of the model's batch size, evenly spread over the samples."""
    first = contract.inputs[0].shape[0] if contract.inputs and contract.inputs[0].shape else 1
    batch = first if isinstance(first, int) and first > 0 else 1
    if samples is None:
        random = np.random.default_rng(seed)
        for _ in range(count):
            yield {spec.name: _drawn(spec, batch, random) for spec in contract.inputs}
        return
    missing = [spec.name for spec in contract.inputs if spec.name not in samples.inputs]
    if missing:
        raise DataError("data.missing_input", f"the data has no array for the input {missing[0]}.")
    starts = range(0, len(samples) - batch + 1, batch)
    if not starts:
        raise DataError("data.empty", f"the data has {len(samples)} samples, the model takes {batch} at once.")
    picks = np.unique(np.linspace(0, len(starts) - 1, num=min(count, len(starts))).round().astype(int))
    for pick in picks:
        start = starts[int(pick)]
        yield {spec.name: np.ascontiguousarray(samples.inputs[spec.name][start : start + batch]) for spec in contract.inputs}


def _drawn(spec: InputSpec, batch: int, random: np.random.Generator) -> Array:
    shape = [batch, *(axis if isinstance(axis, int) and axis > 0 else 1 for axis in spec.shape[1:])]
    low = 0.0 if spec.minimum is None else spec.minimum
    high = 1.0 if spec.maximum is None else spec.maximum
    kind = np.dtype(spec.dtype)
    if kind.kind == "f":
        return random.uniform(low, high, shape).astype(kind)
    return random.integers(int(low), int(high), shape, endpoint=True).astype(kind)


def _choose(answers: Sequence[Mapping[str, Array]], count: int, *, is_classifier: bool) -> list[int]:
    """Indices of samples: in turn from every predicted class, or evenly spread."""
    if not is_classifier:
        return sorted({round(i) for i in np.linspace(0, len(answers) - 1, num=min(count, len(answers)))})
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        scores = next(iter(answer.values()))
        by_class[int(np.argmax(scores.reshape(-1)))].append(index)
    queues = [by_class[key] for key in sorted(by_class)]
    turns = (queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue))
    return sorted(index for index, _ in zip(turns, range(count), strict=False))


def _deviation(
    open_model: ModelOpener, feeds: Sequence[Feeds], expected: Sequence[Mapping[str, Array]], threads: int
) -> tuple[float, str]:
    """The largest |y' - y| that other settings of the same runtime give, and which settings these were."""
    settings = [(1, False), *((n, True) for n in range(2, threads + 1))]
    worst = 0.0
    for count, is_optimized in settings:
        session = open_model(threads=count, is_optimized=is_optimized)
        try:
            for given, answer in zip(feeds, expected, strict=True):
                got = session.run(given)
                worst = max([worst, *(_distance(got[key], value) for key, value in answer.items())])
        finally:
            session.close()
    return worst, f"graph optimization off, and 1..{max(1, threads)} threads"


def _distance(left: Array, right: Array) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0))


def derive_tolerance(
    expected: Sequence[Mapping[str, Array]], deviation: float, *, precision: str, conditions: str
) -> tuple[float, float, str]:
    """The tolerance and its reason.

    Args:
        expected: the outputs of the golden samples.
        deviation: the largest difference that was measured on this machine.
        precision: ``int8...``, ``fp16...``, else taken as fp32.
        conditions: how the deviation was provoked, for the reason.

    Returns:
        atol, rtol, reason.

    Raises:
        ArtifactError: ``golden.unstable`` when the tolerance would be so wide that nothing is tested.
    """
    values = np.concatenate([value.astype(np.float64).ravel() for answer in expected for value in answer.values()])
    span = float(values.max() - values.min()) or float(np.abs(values).max()) or 1.0
    kind = "int8" if "int" in precision else "fp16" if "16" in precision else "fp32"
    floor, why = _floor(kind, span)
    atol = max(MARGIN * deviation, floor)
    if atol > WIDEST_SHARE * span:
        raise ArtifactError(
            "golden.unstable",
            f"the runtime's own answers differ by {deviation:.3g} ({conditions}) over a span of {span:.3g}: "
            "golden samples could not tell a right model from a wrong one.",
            hint="Choose another candidate, or fix the model's unstable operations.",
        )
    measured = f"{deviation:.3g} was measured here ({conditions}), times {MARGIN:.0f}"
    chosen = "the measured deviation decides" if MARGIN * deviation > floor else "the floor decides"
    return atol, _RTOL[kind], f"atol {atol:.3g}: {chosen}. {measured}; floor {floor:.3g}: {why}."


def _floor(kind: str, span: float) -> tuple[float, str]:
    """The least tolerance, for what another CPU's kernels may do that this machine cannot show."""
    if kind == "int8":
        step = span / 255
        why = (
            f"{_INT8_STEPS} steps of {step:.3g} (the outputs' span of {span:.3g} over 255), since int8 kernels round and "
            "accumulate differently between CPUs (with and without dot-product instructions) and each layer may move a step"
        )
        return _INT8_STEPS * step, why
    share, what = (_FP16_SHARE, "half") if kind == "fp16" else (_FP32_SHARE, "single")
    return (
        share * span,
        f"{share:g} of the outputs' span of {span:.3g}, since {what}-precision sums depend on the kernels' order",
    )
