"""Field samples made into a data set: decoded, checked against the contract, joined with their labels, cut in two.

What was redacted is not what the model saw, so it is left out unless the caller says otherwise. An input that came several
times counts once. The part that is held out for the verdict is chosen by each input's own content: the same sample falls on
the same side in every run, and two copies never fall on both sides.

>>> assemble([], Contract(inputs=(), outputs=())).skipped
{}
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edgekit.dataset.data import Array, Dataset, make_dataset
from edgekit.errors import DataError
from edgekit.schema.base import Record
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.message import SampleTensor
from edgekit.schema.work import FieldSample

UNLABELLED = -1
HOLDOUT_SHARE = 0.4
MAX_TENSOR_BYTES = 64 << 20
FEW_A_CLASS = 5
"""Below this many labelled samples a class's own figure says nothing."""
_UNREDACTED = ("none",)
CheckVerdict = Literal["ok", "warning", "refused"]


class FieldCheck(Record, frozen=True, kw_only=True):
    """One thing that was looked at before samples are used."""

    name: str
    verdict: CheckVerdict
    text: str


@dataclass(frozen=True, kw_only=True)
class FieldData:
    """Field samples as a data set; ``labels`` int64 [N] with ``UNLABELLED`` where none came."""

    data: Dataset
    labels: Array
    devices: tuple[str, ...]
    times_ms: Array
    skipped: dict[str, int] = field(default_factory=dict)
    """Why samples were left out, and how many."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> int:
        """How many have a label."""
        return int((self.labels != UNLABELLED).sum())


def decode_tensor(tensor: SampleTensor) -> Array:
    """The array that travelled.

    Raises:
        DataError: ``sample.malformed`` when type, shape, encoding and bytes do not fit each other.
    """
    try:
        kind = np.dtype(tensor.dtype).newbyteorder("<")
        wanted = math.prod(tensor.shape) * kind.itemsize
        data = _unpack(tensor, wanted)
    except (ValueError, TypeError, zlib.error) as error:
        raise _malformed(tensor, str(error)) from error
    if kind.hasobject or min(tensor.shape, default=0) < 0 or len(data) != wanted:
        raise _malformed(tensor, f"{len(data)} bytes, expected {wanted} of {tensor.dtype}{list(tensor.shape)}")
    array = np.frombuffer(data, kind).reshape(tensor.shape)
    return np.ascontiguousarray(array, dtype=kind.newbyteorder("="))


def _unpack(tensor: SampleTensor, wanted: int) -> bytes:
    """The bytes, at most one more than wanted."""
    if wanted > MAX_TENSOR_BYTES:
        return b""
    match tensor.encoding:
        case "":
            return tensor.data
        case "zlib":
            return zlib.decompressobj().decompress(tensor.data, wanted + 1)
        case _:
            raise _malformed(tensor, f"encoding {tensor.encoding}")


def _malformed(tensor: SampleTensor, why: str) -> DataError:
    return DataError("sample.malformed", f'input "{tensor.name}" of a field sample: {why}.')


def assemble(samples: Iterable[FieldSample], contract: Contract, *, with_redacted: bool = False) -> FieldData:
    """Make a data set of what devices gave; what cannot be used is counted and left out.

    Args:
        samples: as the fleet server gives them.
        contract: of the release that served: names, types and shapes of the inputs, names of the classes.
        with_redacted: also those that the device blurred, coarsened or cut; their inputs are not what the model saw.
    """
    kept: list[dict[str, Array]] = []
    labels: list[int] = []
    devices: list[str] = []
    times: list[int] = []
    skipped: Counter[str] = Counter()
    seen: dict[bytes, int] = {}
    for sample in samples:
        feeds, why = _feeds_of(sample, contract, with_redacted=with_redacted)
        if feeds is None:
            skipped[why] += 1
            continue
        label, why = _label_of(sample.label, contract)
        if why:
            skipped[why] += 1
        key = content_key(feeds)
        if (place := seen.get(key)) is not None:
            skipped["came before"] += 1
            labels[place] = label if labels[place] == UNLABELLED else labels[place]
            continue
        seen[key] = len(kept)
        kept.append(feeds)
        labels.append(label)
        devices.append(f"{sample.site}/{sample.device}")
        times.append(sample.time_ms)
    stacked = {
        spec.name: np.stack([feeds[spec.name] for feeds in kept]) if kept else np.zeros((0, 1), np.float32)
        for spec in contract.inputs
    }
    columns = {spec.name: tuple(column.name for column in spec.columns) for spec in contract.inputs if spec.columns}
    data = make_dataset(stacked, class_names=contract.labels, source="field samples", columns=columns)
    return FieldData(
        data=data,
        labels=np.asarray(labels, dtype=np.int64),
        devices=tuple(devices),
        times_ms=np.asarray(times, dtype=np.int64),
        skipped=dict(skipped),
    )


def content_key(feeds: dict[str, Array]) -> bytes:
    """Of one sample's inputs."""
    state = hashlib.sha256()
    for name in sorted(feeds):
        state.update(name.encode() + b"\0" + np.ascontiguousarray(feeds[name]).tobytes())
    return state.digest()


def _feeds_of(sample: FieldSample, contract: Contract, *, with_redacted: bool) -> tuple[dict[str, Array] | None, str]:
    """The inputs without their batch axis, or why they cannot be used."""
    if sample.redacted not in ((), _UNREDACTED) and not with_redacted:
        return None, "redacted"
    found = {tensor.name: tensor for tensor in sample.tensors}
    if set(found) != {spec.name for spec in contract.inputs}:
        return None, "other inputs than the model's"
    feeds = {}
    for spec in contract.inputs:
        try:
            array = decode_tensor(found[spec.name])
        except DataError:
            return None, "damaged"
        if not _fits(array, spec):
            return None, "another type or shape than the contract's"
        if array.dtype.kind == "f" and not np.isfinite(array).all() and spec.missing == "reject":
            return None, "values that are not finite"
        feeds[spec.name] = array[0]
    return feeds, ""


def _fits(array: Array, spec: InputSpec) -> bool:
    if array.dtype.name != spec.dtype or array.ndim != len(spec.shape) or array.shape[:1] != (1,):
        return False
    return all(
        not isinstance(wanted, int) or wanted == have for wanted, have in zip(spec.shape[1:], array.shape[1:], strict=True)
    )


def _label_of(text: str, contract: Contract) -> tuple[int, str]:
    """The class that a label names; a prediction of several samples has the first one's."""
    first = text.split(",", maxsplit=1)[0] if text not in contract.labels else text
    if not first:
        return UNLABELLED, ""
    if first in contract.labels:
        return contract.labels.index(first), ""
    if first.isdecimal() and (not contract.labels or int(first) < len(contract.labels)):
        return int(first), ""
    return UNLABELLED, "a label that is none of the classes"


# --- checks -----------------------------------------------------------------------------------------------------------------


def check_field(found: FieldData, *, min_samples: int, min_labelled: int, contract: Contract) -> tuple[FieldCheck, ...]:
    """What speaks for and against using these samples.

    Args:
        found: the samples.
        min_samples: fewer are refused.
        min_labelled: fewer labelled ones are refused; 0: none are needed.
        contract: for the names of the classes.
    """
    checks = [_check_count("samples", len(found), min_samples, "distinct field samples")]
    if min_labelled:
        checks.append(_check_count("labels", found.labelled, min_labelled, "labelled field samples"))
    checks.append(_check_skipped(found))
    checks.append(_check_spread(found))
    if min_labelled and found.labelled:
        checks.append(_check_classes(found, contract))
    return tuple(checks)


def _check_count(name: str, have: int, wanted: int, what: str) -> FieldCheck:
    verdict: CheckVerdict = "ok" if have >= wanted else "refused"
    return FieldCheck(name=name, verdict=verdict, text=f"{have} {what}, at least {wanted} are needed")


def _check_skipped(found: FieldData) -> FieldCheck:
    shown = ", ".join(f"{count} {why}" for why, count in sorted(found.skipped.items()))
    bad = sum(count for why, count in found.skipped.items() if why not in {"came before", "redacted"})
    is_many = bad > 0.1 * (len(found) + bad)
    return FieldCheck(name="quality", verdict="warning" if is_many else "ok", text=f"left out: {shown or 'none'}")


def _check_spread(found: FieldData) -> FieldCheck:
    """One device that gives most of the samples decides for all."""
    if not found.devices:
        return FieldCheck(name="devices", verdict="warning", text="no device")
    device, most = Counter(found.devices).most_common(1)[0]
    share = most / len(found)
    count = len(set(found.devices))
    is_lopsided = count > 2 and share > 2 / 3
    text = f"{count} devices; {device} gave {share:.0%}"
    return FieldCheck(name="devices", verdict="warning" if is_lopsided or count == 1 else "ok", text=text)


def _check_classes(found: FieldData, contract: Contract) -> FieldCheck:
    counts = np.bincount(found.labels[found.labels != UNLABELLED], minlength=len(contract.labels))
    names = contract.labels or tuple(map(str, range(len(counts))))
    few = [names[index] for index, count in enumerate(counts) if count < FEW_A_CLASS]
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=False))
    verdict: CheckVerdict = "warning" if few else "ok"
    return FieldCheck(name="classes", verdict=verdict, text=f"{shown}{f'; few of {chr(44).join(few)}' if few else ''}")


# --- cutting and mixing -----------------------------------------------------------------------------------------------------


def split_holdout(found: FieldData, *, share: float = HOLDOUT_SHARE, needs_label: bool = True) -> tuple[Array, Array]:
    """Indices to learn from, and those that are held out for the verdict; which they are follows from their content.

    Args:
        found: the samples.
        share: of those that may be held out.
        needs_label: only labelled samples are held out, and all others are to learn from.
    """
    limit = int(share * 2**32)
    held = []
    for place in range(len(found)):
        key = content_key({name: array[place] for name, array in found.data.inputs.items()})
        held.append(int.from_bytes(key[:4]) < limit and (found.labels[place] != UNLABELLED or not needs_label))
    mask = np.asarray(held, dtype=bool)
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def mix(old: Dataset, new: Dataset, *, share: float, seed: int = 0) -> Dataset:
    """Calibration data of which ``share`` is new, as many samples as that allows; labels only where both have them.

    Raises:
        DataError: ``data.share`` when the share is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise DataError("data.share", f"a share of {share:g}: expected more than 0, at most 1.")
    random = np.random.default_rng(seed)
    if share == 1:
        return new
    new_count = min(len(new), round(len(old) * share / (1 - share)))
    old_count = min(len(old), max(1, round(new_count * (1 - share) / share)))
    chosen_old = np.sort(random.permutation(len(old))[:old_count])
    chosen_new = np.sort(random.permutation(len(new))[:new_count])
    return join_data((old.select(chosen_old), new.select(chosen_new)), source=f"{old.source} with field samples")


def join_data(parts: Sequence[Dataset], *, source: str) -> Dataset:
    """Data sets one after the other; labels only where all have them.

    Raises:
        DataError: ``data.missing_input`` when they do not have the same inputs.
    """
    first = parts[0]
    if any(set(part.inputs) != set(first.inputs) for part in parts):
        raise DataError("data.missing_input", f"{source}: the parts do not have the same inputs.")
    labels = [part.labels for part in parts]
    inputs = {name: np.concatenate([part.inputs[name] for part in parts]) for name in first.inputs}
    return make_dataset(
        inputs,
        labels=None if any(each is None for each in labels) else np.concatenate([each for each in labels if each is not None]),
        class_names=first.class_names,
        source=source,
        columns=first.columns,
    )


def with_labels(found: FieldData, places: Array) -> Dataset:
    """The labelled ones among these samples as a labelled data set."""
    chosen = places[found.labels[places] != UNLABELLED]
    part = found.data.select(chosen)
    return make_dataset(
        part.inputs, labels=found.labels[chosen], class_names=part.class_names, source="field samples", columns=part.columns
    )
