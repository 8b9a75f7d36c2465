"""After the answer: true labels that come later, and live inputs that the owner agreed to give.

A worker remembers its last predictions, so that a label that comes in time is only counted: a window says how many predictions
were labelled and how many of them right. A label for a prediction that is too old, that another worker made, or whose input was
sampled, travels itself, and is joined by its prediction id.

    POST /v2/models/NAME/labels   {"prediction_id": "...", "label": "cat"}
                                  {"labels": [{"prediction_id": "...", "label": 3}, ...]}

A label is a class by name or index; for a prediction of several samples a list of them. For a model that is no classifier it is
any text or number, and always travels.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from edgekit.agent.link import Labelled, Model, Sampled, TakeSample
from edgekit.agent.meter import Meter
from edgekit.agent.redaction import parse_rules, redact
from edgekit.errors import DataError
from edgekit.schema.message import SampleTensor

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
MAX_AGE_S = 24 * 3600.0
MAX_SAMPLES = 64
"""A prediction of more samples is not remembered."""
MAX_LABELS = 1000
MAX_TEXT = 128
_PROBABILITY_TOLERANCE = 1e-3

Send = Callable[[Labelled | Sampled], None]


class _Given(msgspec.Struct, frozen=True):
    prediction_id: str
    label: str | int | list[str | int]


class _Body(msgspec.Struct, frozen=True):
    prediction_id: str = ""
    label: str | int | list[str | int] = ""
    labels: list[_Given] = []


@dataclass(slots=True)
class _Remembered:
    """What was answered: predicted class and its probability, a sample each."""

    classes: tuple[int, ...]
    confidences: tuple[float, ...]
    at_s: float
    is_labelled: bool = False
    is_sampled: bool = False


@dataclass(kw_only=True)
class Feedback:
    """Labels and samples of one model in one worker."""

    model: Model
    meter: Meter
    send: Send
    wanted: TakeSample | None = None
    """The next input to give; set by the supervisor, which keeps the quota."""
    now_s: Callable[[], float] = time.monotonic
    _known: OrderedDict[str, _Remembered] = field(default_factory=OrderedDict)
    _seen: dict[int, int] = field(default_factory=dict)
    _scores: str = ""

    def __post_init__(self) -> None:
        contract = self.model.manifest.contract
        if contract.task == "classification" and contract.outputs:
            self._scores = contract.outputs[0].name

    # --- predictions

    def note(self, prediction_id: str, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """An answer was written. Remember it, and give its input if one is wanted."""
        scores = outputs.get(self._scores) if self._scores else None
        found = None
        if prediction_id and scores is not None and scores.ndim > 1 and 0 < scores.shape[0] <= MAX_SAMPLES:
            found = self._remember(prediction_id, scores)
        if self.wanted is not None and prediction_id:
            self._give(self.wanted, prediction_id, feeds, found)

    def _remember(self, prediction_id: str, scores: Any) -> _Remembered:
        rows = scores.reshape(scores.shape[0], -1)
        classes = rows.argmax(axis=1)
        found = _Remembered(tuple(classes.tolist()), _confidences(rows, classes), self.now_s())
        self._known[prediction_id] = found
        self._known.move_to_end(prediction_id)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        for index in found.classes:
            self._seen[index] = self._seen.get(index, 0) + 1
        return found

    def _find(self, prediction_id: str) -> _Remembered | None:
        found = self._known.get(prediction_id)
        return found if found is not None and self.now_s() - found.at_s <= MAX_AGE_S else None

    # --- labels

    def take(self, body: bytes) -> dict[str, int]:
        """Take labels; how many were counted here, and how many travel.

        Raises:
            DataError: ``label.malformed`` or ``label.unknown_class``; then none of them was taken.
        """
        joined = [(given, self._indices(given)) for given in _read(body)]
        counted = sum(self._join(given, indices) for given, indices in joined)
        return {"counted": counted, "forwarded": len(joined) - counted}

    def _join(self, given: _Given, indices: tuple[int, ...] | None) -> bool:
        """Count one label, or let it travel; whether it was counted."""
        found = self._find(given.prediction_id)
        is_counted = found is not None and indices is not None and not found.is_labelled and len(indices) == len(found.classes)
        if is_counted:
            assert found is not None
            assert indices is not None
            found.is_labelled = True
            right = sum(label == predicted for label, predicted in zip(indices, found.classes, strict=True))
            self.meter.count_labels(len(indices), right)
        if not is_counted or (found is not None and found.is_sampled):
            self._forward(given, found, is_counted=is_counted)
        return is_counted

    def _forward(self, given: _Given, found: _Remembered | None, *, is_counted: bool) -> None:
        names = given.label if isinstance(given.label, list) else [given.label]
        self.send(
            Labelled(
                model_digest=self.model.variant.model,
                prediction_id=given.prediction_id,
                label=",".join(self._name(name) for name in names)[:MAX_TEXT],
                predicted=",".join(map(self._name, found.classes))[:MAX_TEXT] if found else "",
                confidence=found.confidences[0] if found else 0.0,
                is_counted=is_counted,
            )
        )

    def _name(self, label: str | int) -> str:
        labels = self.model.manifest.contract.labels
        return labels[label] if isinstance(label, int) and 0 <= label < len(labels) else str(label)

    def _indices(self, given: _Given) -> tuple[int, ...] | None:
        """The classes that a label names; None where the model has no classes."""
        if not given.prediction_id or len(given.prediction_id) > MAX_TEXT:
            raise DataError("label.malformed", f"prediction_id: expected 1 to {MAX_TEXT} characters.")
        if not self._scores:
            return None
        labels, found = self.model.manifest.contract.labels, []
        for label in given.label if isinstance(given.label, list) else [given.label]:
            index = labels.index(label) if label in labels else label
            if isinstance(index, str) and index.isdecimal() and not labels:
                index = int(index)
            if isinstance(index, str) or index < 0 or (labels and index >= len(labels)):
                known = f"one of {', '.join(labels[:20])}, or its index" if labels else "the index of a class"
                raise DataError("label.unknown_class", f"label {label!r}: expected {known}.")
            found.append(index)
        return tuple(found)

    # --- samples

    def _give(self, wanted: TakeSample, prediction_id: str, feeds: Mapping[str, Any], found: _Remembered | None) -> None:
        """Redact this input and send it, unless what was predicted is too rare to be nobody in particular."""
        if found is not None and self._seen.get(found.classes[0], 0) < wanted.k_min:
            return
        self.wanted = None
        contract = self.model.manifest.contract
        columns = {spec.name: [column.name for column in spec.columns] for spec in contract.inputs}
        kept = redact(parse_rules(wanted.redact), {name: array[:1] for name, array in feeds.items()}, columns)
        if not kept:
            logger.error("event=sample_withheld model=%s reason='a rule of redact cannot be followed'", self.model.label)
            return
        tensors = tuple(_tensor(name, array) for name, array in kept.items())
        size = sum(len(tensor.data) for tensor in tensors)
        if size > wanted.max_bytes:
            logger.warning("event=sample_withheld model=%s bytes=%d limit=%d", self.model.label, size, wanted.max_bytes)
            return
        if found is not None:
            found.is_sampled = True
        self.send(
            Sampled(
                model_digest=self.model.variant.model,
                prediction_id=prediction_id[:MAX_TEXT],
                tensors=tensors,
                predicted=self._name(found.classes[0]) if found else "",
                confidence=found.confidences[0] if found else 0.0,
                redacted=wanted.redact,
            )
        )


def _read(body: bytes) -> list[_Given]:
    try:
        given = msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError("label.malformed", f"labels: {error}.", hint='{"prediction_id": "...", "label": "cat"}') from error
    labels = given.labels or [_Given(given.prediction_id, given.label)]
    if len(labels) > MAX_LABELS:
        raise DataError("label.malformed", f"{len(labels)} labels: at most {MAX_LABELS} at once.")
    return labels


def _confidences(rows: Any, classes: Any) -> tuple[float, ...]:
    """Probability of the predicted class, of probabilities or logits [N, C]."""
    values = rows.astype(np.float64)
    best = values[np.arange(len(values)), classes]
    if values.size and (values.min() < 0 or abs(float(values.sum(axis=1).max()) - 1.0) > _PROBABILITY_TOLERANCE):
        best = 1.0 / np.exp(values - best[:, None]).sum(axis=1)
    return tuple(best.tolist())


def _tensor(name: str, array: Any) -> SampleTensor:
    data = np.ascontiguousarray(array).tobytes()
    packed = zlib.compress(data, 6)
    is_smaller = len(packed) < len(data)
    return SampleTensor(
        name=name,
        dtype=str(array.dtype),
        shape=tuple(array.shape),
        data=packed if is_smaller else data,
        encoding="zlib" if is_smaller else "",
    )


def unpack_tensor(tensor: SampleTensor) -> Any:
    """The array of a sampled tensor."""
    data = zlib.decompress(tensor.data) if tensor.encoding == "zlib" else tensor.data
    return np.frombuffer(data, dtype=np.dtype(tensor.dtype)).reshape(tensor.shape)
