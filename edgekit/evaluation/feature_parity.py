"""Proof that features are computed alike: in training and on a device, at once and sample by sample.

Golden features travel with the golden samples: raw samples, the model inputs that came of them where the release was packed,
and what the model said of these. A device pushes the raw samples through its own code in odd chunks and compares bit by bit;
then it runs its model on what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.golden import array_of, compare_sample, tensor_data
from edgekit.errors import ArtifactError, DataError, EdgekitError
from edgekit.features.compute import compute
from edgekit.features.program import Program
from edgekit.features.stream import FeatureWindow, StreamWindows
from edgekit.schema.contract import Contract
from edgekit.schema.features import FeatureSet, ImageFeatures
from edgekit.schema.manifest import GoldenFeatures, GoldenSample, GoldenSet

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

CHUNKS = (1, 7, 64, 3, 500)
GOLDEN_WINDOWS = 4
MAX_GOLDEN_VALUES = 1 << 19
"""Of the raw samples: 4 MB."""
MAX_SINGLE = 50_000
"""Longer tables are not pushed one sample at a time."""
_ROUNDINGS = 4
_FLOAT64_SHARE = 1e-12


@dataclass(frozen=True, kw_only=True)
class FeatureProof:
    """What was compared. ``worst_error``: the largest difference, relative to its tensor's largest value; 0 is bit for bit."""

    samples: int
    is_exact: bool
    worst_error: float


def check_fit(program: Program, contract: Contract) -> None:
    """Refuse features that do not make the model's inputs.

    Raises:
        DataError: ``features.model`` naming the input.
    """
    made, wanted = {spec.name: spec for spec in program.tensors}, {spec.name: spec for spec in contract.inputs}
    if made.keys() != wanted.keys():
        text = f"the features make {', '.join(made)}, the model takes {', '.join(wanted)}."
        raise DataError("features.model", text, hint="Name the declaration's [[inputs]] after the model's.")
    for name, spec in made.items():
        want = wanted[name]
        is_fit = len(spec.shape) == len(want.shape) and all(
            isinstance(axis, str) or axis == have or (place == 0 and axis == 1)
            for place, (axis, have) in enumerate(zip(want.shape, spec.shape, strict=True))
        )
        if not is_fit or spec.dtype != want.dtype:
            text = f'input "{name}": the features make {spec.dtype}{_shape(spec.shape)}, the model takes {want.dtype}'
            raise DataError("features.model", f"{text}{_shape(want.shape)}.", hint="A batch of 1, or a free batch axis.")


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(axis) for axis in shape)}]"


def draw_columns(program: Program, *, seed: int = 0) -> dict[str, Array]:
    """Raw samples for a declaration without any data: noise around 0, numbers of categories, grey images."""
    random = np.random.default_rng(seed)
    if program.stream is not None and program.is_streamed:
        count = program.length + (GOLDEN_WINDOWS + 1) * program.hop
        columns: dict[str, Array] = {name: random.normal(size=count) for name in program.columns}
        if program.stream.time:
            per_second = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[program.stream.time_unit]
            columns[program.stream.time] = np.arange(count) / program.stream.rate_hz * per_second
        return columns
    columns = {}
    for spec in program.features.inputs:
        if isinstance(spec, ImageFeatures):
            shape = (GOLDEN_WINDOWS, spec.height, spec.width, spec.channels)
            columns[spec.raw] = random.integers(0, 256, shape).astype(spec.raw_dtype)
    for name, categories in program.categories.items():
        drawn = random.integers(0, len(categories), GOLDEN_WINDOWS * 2) if categories else ()
        columns[name] = np.array([categories[int(i)] for i in drawn]) if categories else random.normal(size=GOLDEN_WINDOWS * 2)
    return {name: _as_numbers(columns[name]) for name in program.raw_columns}


def _as_numbers(values: Array) -> Array:
    if values.dtype.kind not in "US":
        return values
    try:
        return values.astype(np.float64)
    except ValueError:
        return values


def make_golden_features(program: Program, columns: Mapping[str, Array], run: Run, *, source: str) -> GoldenFeatures:
    """Golden features of raw samples.

    Args:
        program: of the release's features.
        columns: raw samples; of a stream the first stretch that makes a few windows is kept.
        run: the model.
        source: where the samples come from, for people.

    Raises:
        DataError: ``data.empty`` when they make no window.
    """
    kept, found = _first_windows(program, columns) if program.is_streamed else _first_rows(program, columns)
    numbers = {name: array for name, array in kept.items() if array.dtype.kind in "biuf"}
    return GoldenFeatures(
        columns={name: tensor_data(array) for name, array in numbers.items()},
        text={name: tuple(str(value) for value in array.tolist()) for name, array in kept.items() if name not in numbers},
        chunks=CHUNKS if program.is_streamed else (),
        is_exact=program.is_exact,
        source=source,
        expected=tuple(
            GoldenSample(
                inputs={name: tensor_data(array) for name, array in inputs.items()},
                outputs={name: tensor_data(array) for name, array in run(inputs).items()},
            )
            for inputs in found
        ),
    )


def _first_windows(program: Program, columns: Mapping[str, Array]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    table = {name: columns[name][: max(1, MAX_GOLDEN_VALUES // len(program.raw_columns))] for name in program.raw_columns}
    windows = StreamWindows(program).push(table)[:GOLDEN_WINDOWS]
    if not windows:
        compute(table, program)  # says why
        raise AssertionError
    end = windows[-1].last + 1
    return {name: array[:end] for name, array in table.items()}, [window.inputs for window in windows]


def _first_rows(program: Program, columns: Mapping[str, Array]) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    kept = {name: np.asarray(columns[name][: 2 * GOLDEN_WINDOWS]) for name in program.raw_columns}
    inputs = program.of_request(kept)
    rows = len(next(iter(inputs.values())))
    return kept, [{name: array[row : row + 1] for name, array in inputs.items()} for row in range(rows)]


def prove_features(features: FeatureSet, golden: GoldenSet, run: Run | None = None) -> FeatureProof:
    """Compute the golden features here, and compare; with a model also run it on them.

    Args:
        features: the release's.
        golden: its golden set.
        run: the model on this machine's runtime.

    Raises:
        ArtifactError: ``selftest.no_features`` when there is nothing to compare with, ``selftest.features`` when they differ,
            ``selftest.mismatch`` when the model answers otherwise than where it was packed.
    """
    known = golden.features
    if known is None or not known.expected:
        raise ArtifactError("selftest.no_features", "the release declares features and has no golden ones to prove them.")
    try:
        program = Program(features)
        got = _compute_golden(program, known)
    except EdgekitError as error:
        raise ArtifactError("selftest.features", f"the features cannot be computed here: {error.message}") from error
    if len(got) < len(known.expected):
        text = f"{len(got)} feature windows instead of {len(known.expected)} came of the golden stream."
        raise ArtifactError("selftest.features", text)
    worst = 0.0
    for number, (inputs, expected) in enumerate(zip(got, known.expected, strict=False)):
        worst = max(worst, _compare(number, inputs, expected, is_exact=known.is_exact and program.is_exact))
        if run is not None:
            _ratio, why = compare_sample(run(inputs), expected, golden)
            if why:
                raise ArtifactError("selftest.mismatch", f"golden features {number + 1}: the model answers otherwise: {why}.")
    return FeatureProof(samples=len(known.expected), is_exact=worst == 0.0, worst_error=worst)


def _compute_golden(program: Program, known: GoldenFeatures) -> list[dict[str, Array]]:
    columns: dict[str, Array] = {name: array_of(tensor) for name, tensor in known.columns.items()}
    columns |= {name: np.array(values, dtype=object) for name, values in known.text.items()}
    if not program.is_streamed:
        return _first_rows(program, columns)[1]
    return [window.inputs for window in push_in_chunks(StreamWindows(program), columns, known.chunks or CHUNKS)]


def push_in_chunks(stream: StreamWindows, columns: Mapping[str, Array], chunks: Sequence[int]) -> list[FeatureWindow]:
    """What comes of samples that arrive in chunks of these sizes, again and again."""
    count, start, turn = len(next(iter(columns.values()))), 0, 0
    windows: list[FeatureWindow] = []
    while start < count:
        size = max(1, chunks[turn % len(chunks)])
        windows += stream.push({name: array[start : start + size] for name, array in columns.items()})
        start, turn = start + size, turn + 1
    return windows


def _compare(number: int, inputs: Mapping[str, Array], expected: GoldenSample, *, is_exact: bool) -> float:
    worst = 0.0
    for name, tensor in expected.inputs.items():
        want, have = array_of(tensor), inputs.get(name)
        if have is None or have.shape != want.shape or have.dtype != want.dtype:
            raise ArtifactError("selftest.features", f'golden features {number + 1}: input "{name}" has another type or shape.')
        if have.tobytes() == want.tobytes() or np.array_equal(have, want, equal_nan=True):
            continue
        error, allowed = _relative_error(want, have), 0.0 if is_exact else _allowance(want.dtype)
        worst = max(worst, error)
        if not error <= allowed:
            text = f'golden features {number + 1}: input "{name}" differs by {error:.3g} of its largest value, allowed is '
            raise ArtifactError("selftest.features", f"{text}{allowed:.3g}: this machine does not compute what training did.")
    return worst


def _relative_error(want: Array, have: Array) -> float:
    left, right = want.astype(np.float64), have.astype(np.float64)
    if not np.array_equal(np.isnan(left), np.isnan(right)):
        return float("inf")
    largest = float(np.nanmax(np.abs(left), initial=0.0)) or 1.0
    return float(np.nanmax(np.abs(left - right), initial=0.0)) / largest


def _allowance(dtype: np.dtype[Any]) -> float:
    return _FLOAT64_SHARE if dtype == np.float64 else _ROUNDINGS * float(np.finfo(dtype).eps)


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """Batch against a stream in one pattern of chunks."""

    chunks: str
    windows: int
    values: int
    differing: int
    """Values that are not the same to the last bit, windows that are missing on one side included."""


def compare_chunks(columns: Mapping[str, Array], program: Program, *, seed: int = 0, draws: int = 3) -> list[ParityRow]:
    """The whole table at once against streams of it: one by one (where it is short), in blocks, in drawn chunks.

    Raises:
        DataError: as :func:`edgekit.features.compute.compute`.
    """
    raw = {name: columns[name] for name in program.raw_columns}
    batch = compute(raw, program)
    count = len(next(iter(raw.values())))
    random = np.random.default_rng(seed)
    patterns: dict[str, tuple[int, ...]] = {"64": (64,), "1000": (1000,)}
    if count <= MAX_SINGLE:
        patterns["1"] = (1,)
    for draw in range(draws):
        patterns[f"drawn {draw + 1} (1..300)"] = tuple(int(size) for size in random.integers(1, 301, 50))
    rows = []
    for name, sizes in patterns.items():
        windows = push_in_chunks(StreamWindows(program), raw, sizes)
        values = differing = 0
        for key, whole in batch.inputs.items():
            parts = [window.inputs[key] for window in windows]
            stream = np.concatenate(parts) if parts else whole[:0]
            least = min(len(stream), len(whole))
            values += whole.size
            per_window = whole.size // max(1, len(whole))
            differing += abs(len(stream) - len(whole)) * per_window + _differing(stream[:least], whole[:least])
        rows.append(ParityRow(chunks=name, windows=len(windows), values=values, differing=differing))
    return rows


def _differing(left: Array, right: Array) -> int:
    kind = np.dtype(f"u{left.dtype.itemsize}")
    return int(np.count_nonzero(np.ascontiguousarray(left).view(kind) != np.ascontiguousarray(right).view(kind)))
