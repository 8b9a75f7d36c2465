"""A feature set made ready: every call read, every name found, every size known, or a clear refusal.

>>> from edgekit.schema.features import FeatureSet, StreamColumn, StreamSpec, WindowFeatures, WindowPart, WindowSpec
>>> declared = FeatureSet(
...     stream=StreamSpec(name="motor", rate_hz=100, columns=(StreamColumn(name="a"),)),
...     windows=(WindowSpec(name="w", length_s=2, hop_s=1),),
...     inputs=(WindowFeatures(name="x", parts=(WindowPart(window="w", aggregates=("mean", "rms")),)),),
... )
>>> program = Program(declared)
>>> program.windows["w"].length, program.tensors[0].shape, program.names["x"]
(200, ('batch', 2), ('w.a.mean', 'w.a.rms'))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, UsageError
from edgekit.features.aggregates import INEXACT as INEXACT_AGGREGATES
from edgekit.features.aggregates import Window, aggregate, parse_aggregates
from edgekit.features.audio import MelBank
from edgekit.features.calls import Call
from edgekit.features.steps import CODES, apply_steps, encode_categories, normalize, parse_steps
from edgekit.features.steps import INEXACT as INEXACT_STEPS
from edgekit.schema.features import (
    FeatureInput,
    FeatureSet,
    Fill,
    ImageFeatures,
    LogMel,
    StreamSpec,
    TableColumn,
    TableFeatures,
    WindowFeatures,
    WindowPart,
    WindowSamples,
    WindowSpec,
)
from edgekit.schema.tensor import TensorSpec

Array = NDArray[Any]
MAX_WINDOW_VALUES = 1 << 22
"""Of the longest window: 32 MB of state for each stream."""
_WHOLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """One window in samples."""

    name: str
    length: int
    hop: int
    max_missing: float
    fill: Fill


@dataclass(frozen=True)
class _PartPlan:
    columns: tuple[int, ...]
    aggregates: tuple[Call, ...]
    steps: tuple[Call, ...]
    window: str


def _samples(count: int | None, seconds: float | None, *, rate_hz: float, what: str) -> int | None:
    if count is not None and seconds is not None:
        raise UsageError("features.window", f"{what} is given in samples and in seconds.", hint="Give one of them.")
    if seconds is not None:
        exact = seconds * rate_hz
        count = round(exact)
        if abs(exact - count) > _WHOLE * max(1.0, exact):
            text = f"{what} of {seconds:g} s is {exact:g} samples at {rate_hz:g} Hz: no whole number."
            raise UsageError("features.window", text, hint=f"{count / rate_hz:g} s would be {count} samples.")
    if count is not None and count < 1:
        raise UsageError("features.window", f"{what} is {count} samples: at least 1.")
    return count


def _plan_window(spec: WindowSpec, rate_hz: float) -> WindowPlan:
    label = f'window "{spec.name}"'
    length = _samples(spec.length, spec.length_s, rate_hz=rate_hz, what=f"{label}: the length")
    if length is None:
        raise UsageError("features.window", f"{label}: no length.", hint="Give length (samples) or length_s (seconds).")
    hop = _samples(spec.hop, spec.hop_s, rate_hz=rate_hz, what=f"{label}: the hop")
    if not 0 <= spec.max_missing <= 1:
        raise UsageError("features.window", f"{label}: max_missing = {spec.max_missing:g}: a share is between 0 and 1.")
    return WindowPlan(name=spec.name, length=length, hop=hop or length, max_missing=spec.max_missing, fill=spec.fill)


def _unique(names: Sequence[str], what: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError("features.twice", f'two {what} are called "{twice}".', hint="Give each its own name.")


class Program:
    """What a feature set says, ready to be done.

    Raises:
        UsageError: ``features.*``, naming what does not fit.
    """

    def __init__(self, features: FeatureSet) -> None:
        self.features = features
        self.stream = features.stream
        _unique([each.name for each in features.inputs], "inputs")
        if not features.inputs:
            raise UsageError("features.empty", "no input is declared.", hint="Declare [[inputs]], one for each of the model's.")
        is_streamed = {isinstance(each, WindowFeatures | WindowSamples | LogMel) for each in features.inputs}
        if len(is_streamed) > 1:
            text = "some inputs are made of a stream's windows, some of a request."
            raise UsageError("features.mixed", text, hint="A model is fed by a stream or by requests.")
        self.is_streamed = is_streamed == {True}
        self.columns = self._check_stream(features.stream) if features.stream and self.is_streamed else ()
        self.windows = self._check_windows(features) if self.is_streamed else {}
        self.hop = next((plan.hop for plan in self.windows.values()), 0)
        self.length = max((plan.length for plan in self.windows.values()), default=0)
        self._used: dict[str, set[int]] = {name: set() for name in self.windows}
        self._parts: dict[str, tuple[_PartPlan, ...]] = {}
        self._steps: dict[str, tuple[Call, ...]] = {}
        self._tables: dict[str, tuple[tuple[Call, ...], ...]] = {}
        self._mels: dict[str, MelBank] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        """Of the places on an input's last axis, where they have names."""
        self.tensors = tuple(self._plan(each) for each in features.inputs)
        self.is_exact = not self._mels and not self._calls() & (INEXACT_AGGREGATES | INEXACT_STEPS)
        """Whether another machine gets the same bits; see :mod:`edgekit.features.aggregates`."""

    def _calls(self) -> set[str]:
        calls = [call for parts in self._parts.values() for part in parts for call in (*part.aggregates, *part.steps)]
        calls += [call for steps in self._steps.values() for call in steps]
        return {call.name for call in (*calls, *(c for table in self._tables.values() for steps in table for c in steps))}

    # --- checks -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_stream(stream: StreamSpec) -> tuple[str, ...]:
        names = tuple(column.name for column in stream.columns)
        _unique(names, "columns")
        if not names or stream.time in names:
            raise UsageError("features.stream", f'stream "{stream.name}": declare its columns; time is not one of them.')
        if not stream.rate_hz > 0 or stream.late_s < 0 or stream.reset_after_s <= 0:
            raise UsageError(
                "features.stream", f'stream "{stream.name}": rate_hz and reset_after_s are above 0, late_s 0 or more.'
            )
        return names

    def _check_windows(self, features: FeatureSet) -> dict[str, WindowPlan]:
        if features.stream is None:
            raise UsageError("features.stream", "windows are declared, and no [stream] to cut them from.")
        _unique([spec.name for spec in features.windows], "windows")
        plans = {spec.name: _plan_window(spec, features.stream.rate_hz) for spec in features.windows}
        if len({plan.hop for plan in plans.values()}) > 1:
            found = ", ".join(f"{plan.name}: {plan.hop}" for plan in plans.values())
            text = f"windows have hops of different lengths, in samples: {found}."
            raise UsageError("features.window", text, hint="All windows of a model end together: give them one hop.")
        for plan in plans.values():
            if plan.length * len(self.columns) > MAX_WINDOW_VALUES:
                raise UsageError("features.window", f'window "{plan.name}" holds more than {MAX_WINDOW_VALUES} values.')
        return plans

    def _window(self, name: str, input_name: str) -> WindowPlan:
        if name not in self.windows:
            known = ", ".join(self.windows) or "none"
            raise UsageError("features.window", f'input "{input_name}": there is no window "{name}"; declared: {known}.')
        return self.windows[name]

    def _places(self, names: tuple[str, ...], input_name: str) -> tuple[int, ...]:
        for name in names:
            if name not in self.columns:
                text = f'input "{input_name}": the stream has no column "{name}"; it has {", ".join(self.columns)}.'
                raise UsageError("features.column", text)
        return tuple(self.columns.index(name) for name in names) or tuple(range(len(self.columns)))

    # --- plans --------------------------------------------------------------------------------------------------------------

    def _plan(self, spec: FeatureInput) -> TensorSpec:
        shape: tuple[int, ...]
        match spec:
            case WindowFeatures():
                self._parts[spec.name] = tuple(self._plan_part(part, spec.name) for part in spec.parts)
                names = tuple(name for part in self._parts[spec.name] for name in self._figure_names(part))
                _unique(names, "figures")
                self.names[spec.name], shape = names, (len(names),)
                _check_norm(spec.name, spec.mean, spec.std, len(names))
            case WindowSamples():
                plan, places = self._window(spec.window, spec.name), self._places(spec.columns, spec.name)
                self._used[spec.window].update(places)
                self._steps[spec.name] = parse_steps(spec.steps)
                shape = (plan.length, len(places)) if spec.layout == "time_first" else (len(places), plan.length)
                _check_norm(spec.name, spec.mean, spec.std, len(places))
                if spec.layout == "time_first":
                    self.names[spec.name] = tuple(self.columns[place] for place in places)
            case LogMel():
                plan = self._window(spec.window, spec.name)
                self._used[spec.window].update(self._places((spec.column,), spec.name))
                assert self.stream is not None
                bank = self._mels[spec.name] = MelBank(spec, length=plan.length, rate_hz=self.stream.rate_hz)
                _check_filled(plan, "a spectrum")
                self._steps[spec.name] = parse_steps(spec.steps)
                shape = (bank.frames, spec.bands) if spec.layout == "time_first" else (spec.bands, bank.frames)
            case TableFeatures():
                _unique([column.name for column in spec.columns], "columns")
                self._tables[spec.name] = tuple(parse_steps(column.steps, is_table=True) for column in spec.columns)
                pairs = zip(spec.columns, self._tables[spec.name], strict=True)
                self.names[spec.name] = tuple(name for column, steps in pairs for name in _place_names(column, steps))
                shape = (len(self.names[spec.name]),)
            case ImageFeatures():
                if spec.raw == spec.name:
                    text = f'input "{spec.name}": raw is the same name; a request says by its names which of them it holds.'
                    raise UsageError("features.image", text, hint='Call the raw one, for example, "photo".')
                image = (spec.height, spec.width, spec.channels)
                _check_norm(spec.name, spec.mean, spec.std, spec.channels)
                shape = image if spec.layout == "channel_last" else (spec.channels, spec.height, spec.width)
            case _:
                assert_never(spec)
        if not np.dtype(spec.dtype).kind == "f":
            raise UsageError(
                "features.dtype", f'input "{spec.name}": features are float16, float32 or float64, not {spec.dtype}.'
            )
        return TensorSpec(name=spec.name, dtype=spec.dtype, shape=("batch", *shape))

    def _plan_part(self, part: WindowPart, input_name: str) -> _PartPlan:
        plan, places = self._window(part.window, input_name), self._places(part.columns, input_name)
        assert self.stream is not None
        calls = parse_aggregates(part.aggregates, self.stream.rate_hz)
        if not calls:
            raise UsageError("features.empty", f'input "{input_name}": a part names no aggregates.')
        if any(call.name == "energy" for call in calls):
            _check_filled(plan, "a spectrum")
        self._used[part.window].update(places)
        return _PartPlan(places, calls, parse_steps(part.steps), part.window)

    def _figure_names(self, part: _PartPlan) -> list[str]:
        return [f"{part.window}.{self.columns[place]}.{call.text}" for place in part.columns for call in part.aggregates]

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """What a table of raw samples, or a raw request, has to hold."""
        if self.stream is not None and self.is_streamed:
            return (*((self.stream.time,) if self.stream.time else ()), *self.columns)
        names: dict[str, None] = {}
        for spec in self.features.inputs:
            match spec:
                case TableFeatures():
                    names.update(dict.fromkeys(column.name for column in spec.columns))
                case ImageFeatures():
                    names[spec.raw] = None
                case _:
                    pass
        return tuple(names)

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """By column of a request, its categories; none for a number."""
        found: dict[str, tuple[str, ...]] = {}
        for spec in self.features.inputs:
            if isinstance(spec, TableFeatures):
                for column, steps in zip(spec.columns, self._tables[spec.name], strict=True):
                    found[column.name] = steps[0].arguments if steps and steps[0].name in CODES else ()
        return found

    # --- windows ------------------------------------------------------------------------------------------------------------

    def of_windows(self, windows: Mapping[str, Array]) -> dict[str, Array] | None:
        """The model's inputs of one end of windows.

        Args:
            windows: by name, float64 [columns, length], NaN where a sample is missing.

        Returns:
            Every input, [1, ...]; None when a window misses more than it may.
        """
        ready: dict[str, Window] = {}
        for name, values in windows.items():
            plan, used = self.windows[name], sorted(self._used[name])
            missing = np.count_nonzero(np.isnan(values), axis=-1)
            if missing[used].max(initial=0) > plan.max_missing * plan.length:
                return None
            assert self.stream is not None
            filled = _filled(values, plan.fill) if missing.any() else values
            ready[name] = Window(filled, missing.astype(np.float64), self.stream.rate_hz)
        tensors = zip(self.features.inputs, self.tensors, strict=True)
        return {spec.name: self._of(spec, ready).astype(tensor.dtype)[None] for spec, tensor in tensors}

    def _of(self, spec: FeatureInput, windows: Mapping[str, Window]) -> Array:
        match spec:
            case WindowFeatures():
                parts = [self._figures(part, windows[part.window]) for part in self._parts[spec.name]]
                return _normalized(parts[0] if len(parts) == 1 else np.concatenate(parts), spec.mean, spec.std)
            case WindowSamples():
                values = windows[spec.window].values[list(self._places(spec.columns, spec.name))]
                stepped = _normalized(np.ascontiguousarray(apply_steps(values, self._steps[spec.name]).T), spec.mean, spec.std)
                return stepped if spec.layout == "time_first" else np.ascontiguousarray(stepped.T)
            case LogMel():
                row = windows[spec.window].values[self.columns.index(spec.column)]
                made = apply_steps(self._mels[spec.name].apply(row), self._steps[spec.name])
                return made if spec.layout == "time_first" else np.ascontiguousarray(made.T)
            case _:
                raise AssertionError(spec.name)

    def _figures(self, part: _PartPlan, window: Window) -> Array:
        if len(part.columns) < len(self.columns) or part.columns != tuple(range(len(self.columns))):
            chosen = list(part.columns)
            window = Window(window.values[chosen], window.missing[chosen], window.rate_hz)
        return apply_steps(aggregate(window, part.aggregates).reshape(-1), part.steps)

    # --- requests -----------------------------------------------------------------------------------------------------------

    def of_request(self, raw: Mapping[str, Array]) -> dict[str, Array]:
        """The model's inputs of raw columns [N] or [N, 1] and images [N, height, width, channels].

        Raises:
            DataError: ``data.missing_input``, ``data.shape`` or ``data.dtype``.
        """
        for name in self.raw_columns:
            if name not in raw:
                text = f'column "{name}" is missing; the features are made of {", ".join(self.raw_columns)}.'
                raise DataError("data.missing_input", text)
        made = {}
        for spec, tensor in zip(self.features.inputs, self.tensors, strict=True):
            match spec:
                case TableFeatures():
                    made[spec.name] = self._of_table(spec, raw).astype(tensor.dtype)
                case ImageFeatures():
                    made[spec.name] = _of_image(spec, raw[spec.raw]).astype(tensor.dtype)
                case _:
                    raise AssertionError(spec.name)
        return made

    def _of_table(self, spec: TableFeatures, raw: Mapping[str, Array]) -> Array:
        parts = []
        for column, steps in zip(spec.columns, self._tables[spec.name], strict=True):
            values = raw[column.name]
            if values.ndim != 1 and values.shape[1:] != (1,):
                raise DataError("data.shape", f'column "{column.name}" has shape {list(values.shape)}, expected [N] or [N, 1].')
            if steps and steps[0].name in CODES:
                parts.append(apply_steps(encode_categories(column.name, values, steps[0]), steps[1:]))
                continue
            if values.dtype.kind not in "biuf":
                text = f'column "{column.name}" holds text, its steps are for numbers.'
                raise DataError("data.dtype", text, hint='Name its categories: steps = ["one_hot(a, b)"].')
            parts.append(apply_steps(values.reshape(-1).astype(np.float64), steps)[:, None])
        if len({len(part) for part in parts}) > 1:
            raise DataError("data.shape", f'input "{spec.name}": its columns have different lengths.')
        return np.concatenate(parts, axis=1)


def _check_norm(name: str, mean: tuple[float, ...], std: tuple[float, ...], count: int) -> None:
    if (mean or std) and not (len(mean) == len(std) == count and min(std) > 0):
        text = f'input "{name}": {len(mean)} means and {len(std)} standard deviations for {count} places.'
        raise UsageError("features.normalize", text, hint="Give both, one for each place; a deviation is above 0.")


def _check_filled(plan: WindowPlan, what: str) -> None:
    if plan.fill == "none" and plan.max_missing > 0:
        text = f'window "{plan.name}": {what} needs every sample, and {plan.max_missing:g} of them may be missing.'
        raise UsageError("features.window", text, hint='Give the window a fill, for example "linear", or max_missing = 0.')


def _place_names(column: TableColumn, steps: tuple[Call, ...]) -> list[str]:
    if steps and steps[0].name == "one_hot":
        return [f"{column.name}={category}" for category in steps[0].arguments]
    return [column.name]


def _normalized(values: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    return normalize(values, np.array(mean), np.array(std)) if mean else values


def _of_image(spec: ImageFeatures, raw: Array) -> Array:
    expected = (spec.height, spec.width, spec.channels)
    if raw.dtype.name != spec.raw_dtype or raw.shape[1:] != expected:
        text = f'image "{spec.raw}" is {raw.dtype.name}{list(raw.shape)}, expected {spec.raw_dtype} [N, {spec.height}, '
        raise DataError("data.shape", f"{text}{spec.width}, {spec.channels}].")
    values = _normalized(raw.astype(np.float64) * spec.scale, spec.mean, spec.std)
    return values if spec.layout == "channel_last" else np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def _filled(values: Array, fill: Fill) -> Array:
    """A copy with something in the place of what is missing; a column without any sample stays as it is."""
    if fill == "none":
        return values
    out = values.copy()
    everything = np.arange(values.shape[1])
    for row in out:
        gone = np.isnan(row)
        if not gone.any() or gone.all():
            continue
        there = np.flatnonzero(~gone)
        match fill:
            case "zero":
                row[gone] = 0.0
            case "linear":
                row[gone] = np.interp(everything[gone], there, row[there])
            case "hold":
                before = np.maximum(np.searchsorted(there, everything[gone], side="right") - 1, 0)
                row[gone] = row[there[before]]
            case _:
                assert_never(fill)
    return out
