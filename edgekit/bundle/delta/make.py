"""Make a delta between two model files: tensors by name, subtracted; the rest copied or literal; and hdiffpatch as a rival.

The smaller of ``tsub1`` and ``hdiff`` is kept, and none when it is not below 0.7 times the file itself: that is what a device
would download instead. It is applied once before it is given out. Reasons and measurements: docs/deltas.md.

    >>> made = make_delta(Path("old.onnx"), Path("new.onnx"))  # doctest: +SKIP
    >>> made.codec, len(made.content)                           # doctest: +SKIP
    ('tsub1', 31877)
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.delta.apply import CHUNK, apply_delta, save_tables
from edgekit.bundle.delta.flat import find_flat_tensors
from edgekit.bundle.delta.layout import MAX_SIDE_BYTES, Header, Kind, Region, encode_header, pack, parse_header
from edgekit.bundle.delta.predict import channel_of, fold, multiply, rescale
from edgekit.bundle.delta.rans import Tables, cost_bits, encode, make_tables
from edgekit.bundle.delta.rows import MISSING, changed_axis, match_rows, rows_along, runs
from edgekit.bundle.delta.tensors import FLOAT, INT8, UINT8, Tensor, find_tensors
from edgekit.errors import EdgekitError
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import DeltaCodec, DeltaRef

logger = logging.getLogger(__name__)
WORTH_SHARE = 0.7
_MOVED_SHARE, _STRANGE_SHARE = 0.05, 0.1
_TABLE_COUNTS = (1, 2, 4, 8, 16, 32)
_ROUNDS = 6
_ANCHOR = 24
"""Bytes that must be equal for a copy within what is no tensor."""
_MAX_ANCHORED_BYTES = 8 << 20
_FLOAT_BYTES = 4
_MAX_PRODUCT, _MAX_SCALARS = 1 << 16, 4096
_RIVAL_BYTES = 128 << 20
_MAX_PIECES = 20_000
"""Copies within one tensor."""
_MAX_GROUPS, _LEAST_PER_GROUP = 1 << 16, 32
"""Channels that choose their table (each needs 2 kB to count in), and how many bytes one must have for it."""
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class MadeDelta:
    """A delta that is worth its bytes."""

    codec: DeltaCodec
    content: bytes


def make_delta(base: Path, target: Path, *, codecs: Sequence[DeltaCodec] = ("tsub1", "hdiff")) -> MadeDelta | None:
    """The smallest delta from one file to another; None when the whole file is not much larger.

    Args:
        base: the file that devices have.
        target: the file that they shall have.
        codecs: which to try; hdiff is left out where hdiffpatch is not installed.
    """
    old, new = base.read_bytes(), target.read_bytes()
    tried: list[MadeDelta] = []
    if "tsub1" in codecs:
        tried.append(MadeDelta("tsub1", subtract(old, new)))
    if "hdiff" in codecs and max(len(old), len(new)) <= _RIVAL_BYTES and _may_lose(tried, new):
        rival = _hdiff(old, new)
        tried += [MadeDelta("hdiff", rival)] if rival is not None else []
    worth = [made for made in tried if len(made.content) < WORTH_SHARE * len(new)]
    fits = (made for made in sorted(worth, key=lambda made: len(made.content)) if _gives(made, base, old, new))
    return next(fits, None)


def _gives(made: MadeDelta, base: Path, old: bytes, new: bytes) -> bool:
    """Whether a device would make the target of it: nothing is published that was not tried."""
    digests = {"base": digest_bytes(old), "target": digest_bytes(new), "digest": digest_bytes(made.content)}
    ref = DeltaRef(**digests, size_bytes=len(made.content), codec=made.codec)
    try:
        with Path(os.devnull).open("wb") as sink:
            apply_delta(io.BytesIO(made.content), base, sink, ref=ref, size_bytes=len(new))
    except EdgekitError as error:
        logger.warning("a %s delta from %s is left out: %s", made.codec, base, error.message)
        return False
    return True


def _may_lose(tried: Sequence[MadeDelta], new: bytes) -> bool:
    """Whether hdiffpatch, which takes minutes where most bytes changed, may be smaller.

    It may for files that moved more than they changed, or that have much without a twin; where tensors changed in place it
    never was.
    """
    if not tried:
        return True
    content = tried[0].content
    header, _ = parse_header(content)
    return len(content) < _MOVED_SHARE * len(new) or header.literals_size > _STRANGE_SHARE * len(content)


def _hdiff(old: bytes, new: bytes) -> bytes | None:
    try:
        hdiffpatch = importlib.import_module("hdiffpatch")
    except ImportError:
        return None
    made: bytes = hdiffpatch.diff(old, new, compression="lzma2")
    return made


# --- tsub1


@dataclass
class _Plan:
    """What is gathered for a delta."""

    regions: list[Region] = field(default_factory=list)
    side: bytearray = field(default_factory=bytearray)
    origins: list[tuple[int, int]] = field(default_factory=list)
    literals: list[bytes] = field(default_factory=list)
    planes: list[bytes] = field(default_factory=list)
    residuals: list[Bytes] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    """Channels and inner size of each residual."""

    def copy(self, length: int, offset: int) -> None:
        last = self.regions[-1] if self.regions else None
        if last is not None and last.kind == Kind.COPY and last.offset + last.length == offset:
            self.regions[-1] = Region(Kind.COPY, last.length + length, last.offset)
        elif length:
            self.regions.append(Region(Kind.COPY, length, offset))

    def literal(self, data: bytes) -> None:
        if not data:
            return
        self.literals.append(data)
        last = self.regions[-1] if self.regions else None
        if last is not None and last.kind == Kind.LITERAL:
            self.regions[-1] = Region(Kind.LITERAL, last.length + len(data))
        else:
            self.regions.append(Region(Kind.LITERAL, len(data)))


def subtract(old: bytes, new: bytes) -> bytes:
    """A ``tsub1`` delta."""
    plan = _Plan()
    if old == new:
        plan.copy(len(new), 0)
    else:
        _Planner(plan, old, new).run()
    return _encode(plan, old, new)


class _Planner:
    """Two files, and what is known of their tensors."""

    def __init__(self, plan: _Plan, old: bytes, new: bytes) -> None:
        self._plan, self._old, self._new = plan, old, new
        self._before, self._after = _tensors_of(old), _tensors_of(new)
        self._between = _Between(old, self._before)
        self._side_of = self._gather_scales()
        scalars = [each for each in self._after.values() if each.kind == FLOAT and each.size_bytes == _FLOAT_BYTES]
        self._scalars = sorted({int.from_bytes(_bytes_of(new, tensor), "little") for tensor in scalars})[:_MAX_SCALARS]

    def run(self) -> None:
        """Plan the whole target."""
        at = 0
        for tensor in sorted(self._after.values(), key=lambda tensor: tensor.offset):
            twin = self._before.get(tensor.name)
            if tensor.offset < at:
                continue  # bytes that two names share
            field = _field_of(self._new, tensor)
            if field and tensor.field_offset >= at and twin is not None and _field_of(self._old, twin) == field:
                self._between.plan(self._plan, self._new[at : tensor.field_offset], at)
                self._plan.copy(tensor.field_bytes, twin.field_offset)
                at = tensor.field_offset + tensor.field_bytes
                continue
            if not tensor.size_bytes:
                continue
            self._between.plan(self._plan, self._new[at : tensor.offset], at)
            at = tensor.offset + tensor.size_bytes
            self._plan_tensor(twin, tensor)
        self._between.plan(self._plan, self._new[at:], at)

    def _gather_scales(self) -> dict[str, int]:
        """New scales of weights that will be predicted: needed before the weights, wherever they lie in the file."""
        found: dict[str, int] = {}
        side = self._plan.side
        for tensor in sorted(self._after.values(), key=lambda tensor: tensor.offset):
            scale, twin = self._after.get(tensor.scale), self._before.get(tensor.name)
            old_scale = self._before.get(twin.scale) if twin else None
            if scale is None or twin is None or old_scale is None or scale.name in found:
                continue
            if old_scale.shape != scale.shape or twin.shape != tensor.shape or len(side) + scale.size_bytes > MAX_SIDE_BYTES:
                continue
            data = _bytes_of(self._new, scale)
            if data != _bytes_of(self._old, old_scale):
                found[scale.name] = len(side)
                side += data
                self._plan.origins.append((old_scale.offset, old_scale.size_bytes))
        return found

    def _plan_tensor(self, twin: Tensor | None, tensor: Tensor) -> None:
        data = _bytes_of(self._new, tensor)
        if tensor.name in self._side_of:
            self._plan.regions.append(Region(Kind.SIDE, len(data), self._side_of[tensor.name]))
            return
        if twin is None or (twin.kind, twin.shape, twin.size_bytes) != (tensor.kind, tensor.shape, tensor.size_bytes):
            if twin is None or not _plan_rows(self._plan, _bytes_of(self._old, twin), data, twin, tensor):
                self._between.plan(self._plan, data, tensor.offset)
            return
        base = _bytes_of(self._old, twin)
        if base == data:
            self._plan.copy(len(data), twin.offset)
        elif (product := self._find_product(tensor, data)) is not None:
            self._plan.regions.append(product)
        elif tensor.kind in {INT8, UINT8}:
            self._plan_quantized(base, data, twin, tensor)
        elif tensor.item_bytes in {2, 4}:
            _plan_wide(self._plan, base, data, twin.offset, tensor.item_bytes)
        else:
            _plan_bytes(self._plan, base, data, twin.offset, (1, len(data)))

    def _find_product(self, tensor: Tensor, data: bytes) -> Region | None:
        """A bias's scales are its weight's times the activation's: nothing of them needs to travel but the factor."""
        count = math.prod(tensor.shape)
        if tensor.kind != FLOAT or not 1 < count <= _MAX_PRODUCT:
            return None
        for name, begin in self._side_of.items():
            if math.prod(self._after[name].shape) != count:
                continue
            scales = np.frombuffer(bytes(self._plan.side[begin : begin + 4 * count]), "<f4")
            for factor in self._scalars:
                if multiply(scales, factor) == data:
                    return Region(kind=Kind.PRODUCT, length=len(data), offset=factor, new_scales=begin, scales=count)
        return None

    def _plan_quantized(self, base: bytes, data: bytes, twin: Tensor, tensor: Tensor) -> None:
        axis = max(tensor.axis, 0)
        channels = tensor.shape[axis] if tensor.shape else 1
        group = (channels, math.prod(tensor.shape[axis + 1 :]) if tensor.shape else 1)
        if tensor.scale not in self._side_of:
            _plan_bytes(self._plan, base, data, twin.offset, group)
            return
        old_scale = self._before[twin.scale]
        count, begin = math.prod(old_scale.shape), self._side_of[tensor.scale]
        region = Region(
            kind=Kind.RESCALE,
            length=len(data),
            offset=twin.offset,
            channels=channels,
            inner=group[1],
            old_scales=old_scale.offset,
            new_scales=begin,
            scales=count,
            is_signed=tensor.kind == INT8,
            zero_point=_zero_point(self._old, self._before.get(twin.zero_point)),
        )
        values, wanted = np.frombuffer(base, np.uint8), np.frombuffer(data, np.uint8)
        residual = wanted - self._predict(region, values)
        if _cost(wanted - values) <= _cost(residual):
            _plan_bytes(self._plan, base, data, twin.offset, group)
            return
        self._plan.regions.append(region)
        self._plan.residuals.append(residual)
        self._plan.groups.append(group)

    def _predict(self, region: Region, values: Bytes) -> Bytes:
        count = region.scales
        side = bytes(self._plan.side[region.new_scales : region.new_scales + 4 * count])
        new_scales, old_scales = np.frombuffer(side, "<f4"), np.frombuffer(self._old, "<f4", count, region.old_scales)
        found = np.empty_like(values)
        for at in range(0, len(values), CHUNK):  # as many doubles at a time
            part = values[at : at + CHUNK]
            channel = channel_of(at, len(part), channels=region.channels, inner=region.inner) * (count > 1)
            found[at : at + CHUNK] = rescale(
                part, old_scales[channel], new_scales[channel], is_signed=region.is_signed, zero_point=region.zero_point
            )
        return found


def _tensors_of(content: bytes) -> dict[str, Tensor]:
    return find_flat_tensors(content) or find_tensors(content)


def _field_of(data: bytes, tensor: Tensor) -> bytes:
    return data[tensor.field_offset : tensor.field_offset + tensor.field_bytes]


def _bytes_of(data: bytes, tensor: Tensor) -> bytes:
    return data[tensor.offset : tensor.offset + tensor.size_bytes]


def _plan_wide(plan: _Plan, base: bytes, data: bytes, offset: int, width: int) -> None:
    kind = np.dtype(f"<u{width}")
    differences = np.frombuffer(data, kind) - np.frombuffer(base, kind)
    plan.planes += [fold(differences[at : at + CHUNK]) for at in range(0, len(differences), CHUNK)]
    plan.regions.append(Region(Kind.WIDE, len(data), offset, width))


def _plan_rows(plan: _Plan, base: bytes, data: bytes, twin: Tensor, tensor: Tensor) -> bool:
    """A tensor that lost or got rows: copies of those that both have. False when too few are the same."""
    axis = changed_axis(twin.shape, tensor.shape)
    if axis is None or twin.kind != tensor.kind or not twin.size_bytes:
        return False
    inner = math.prod(tensor.shape[axis + 1 :]) * tensor.item_bytes
    before, after = (rows_along(part, each.shape, each.item_bytes, axis) for part, each in ((base, twin), (data, tensor)))
    matches = match_rows(before, after)
    pieces, outer = runs(matches), math.prod(tensor.shape[:axis])
    if matches.count(MISSING) > len(matches) // 2 or len(pieces) * outer > _MAX_PIECES:
        return False
    for place in range(outer):
        for source, begin, count in pieces:
            at = (place * tensor.shape[axis] + begin) * inner
            if source == MISSING:
                plan.literal(data[at : at + count * inner])
            else:
                plan.copy(count * inner, twin.offset + (place * twin.shape[axis] + source) * inner)
    return True


def _plan_bytes(plan: _Plan, base: bytes, data: bytes, offset: int, group: tuple[int, int]) -> None:
    residual = np.frombuffer(data, np.uint8) - np.frombuffer(base, np.uint8)
    plan.regions.append(Region(Kind.SUBTRACT, len(data), offset, channels=group[0], inner=group[1]))
    plan.residuals.append(residual)
    plan.groups.append(group)


def _zero_point(old: bytes, tensor: Tensor | None) -> int:
    """The zero point, where it is one and the same for all channels; else 0, which only makes the prediction worse."""
    if tensor is None or tensor.kind not in {INT8, UINT8} or not tensor.size_bytes:
        return 0
    kind = np.int8 if tensor.kind == INT8 else np.uint8
    values = np.frombuffer(old, kind, tensor.size_bytes, tensor.offset)
    return int(values[0]) if len(values) and (values == values[0]).all() else 0


def _cost(residual: Bytes) -> float:
    """Bits by order-0 entropy."""
    counts = np.bincount(residual, minlength=256).astype(np.float64)
    share = counts[counts > 0] / len(residual)
    return float(-(counts[counts > 0] * np.log2(share)).sum())


class _Between:
    """What is no tensor, or a tensor without a twin: copies of what the base has outside its tensors, else literals."""

    def __init__(self, old: bytes, tensors: dict[str, Tensor]) -> None:
        self._old = old
        self._anchors: dict[bytes, int] = {}
        at = 0
        pieces = []
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            pieces.append((at, tensor.offset))
            at = tensor.offset + tensor.size_bytes
        pieces.append((at, len(old)))
        if sum(end - begin for begin, end in pieces) > _MAX_ANCHORED_BYTES:
            pieces = []
        for begin, end in pieces:
            for place in range(begin, end - _ANCHOR + 1, 4):
                self._anchors.setdefault(old[place : place + _ANCHOR], place)

    def plan(self, plan: _Plan, data: bytes, at: int) -> None:
        """Plan bytes that lie at ``at`` in the target."""
        if data and self._old[at : at + len(data)] == data:
            plan.copy(len(data), at)
            return
        if len(data) > _MAX_ANCHORED_BYTES or not self._anchors:
            plan.literal(data)
            return
        done = place = 0
        while place + _ANCHOR <= len(data):
            source = self._anchors.get(data[place : place + _ANCHOR])
            if source is None:
                place += 1
                continue
            begin, length = self._grow(data, place, source, done)
            plan.literal(data[done:begin])
            plan.copy(length, source - (place - begin))
            done = place = begin + length
        plan.literal(data[done:])

    def _grow(self, data: bytes, place: int, source: int, floor: int) -> tuple[int, int]:
        """The longest equal run around an anchor: where it begins in the data, and its length."""
        old, begin, back = self._old, place, source
        while begin > floor and back > 0 and data[begin - 1] == old[back - 1]:
            begin, back = begin - 1, back - 1
        end, ahead = place + _ANCHOR, source + _ANCHOR
        while end < len(data) and ahead < len(old) and data[end] == old[ahead]:
            end, ahead = end + 1, ahead + 1
        return begin, end - begin


# --- coding


def _encode(plan: _Plan, old: bytes, new: bytes) -> bytes:
    tables, classes = _choose_tables(plan.residuals, plan.groups)
    regions, at = [], 0
    for region in plan.regions:
        if region.kind in {Kind.SUBTRACT, Kind.RESCALE}:
            regions.append(_named(region, at))
            at += region.channels
        else:
            regions.append(region)
    blocks = _blocks(plan, classes, tables) if tables is not None else []
    side, planes, literals = pack(_side(plan, old)), pack(b"".join(plan.planes)), pack(b"".join(plan.literals))
    packed_tables = save_tables(tables) if tables is not None else b""
    header = Header(
        base_size=len(old),
        target_size=len(new),
        regions=regions,
        classes=b"".join(part.tobytes() for part in classes),
        origins=plan.origins,
        side_size=len(side),
        tables_size=len(packed_tables),
        blocks=[len(block) for block in blocks],
        planes_size=len(planes),
        literals_size=len(literals),
    )
    return b"".join([encode_header(header), side, packed_tables, *blocks, planes, literals])


def _side(plan: _Plan, old: bytes) -> bytes:
    """The new scales as differences to the old ones."""
    before = b"".join(old[begin : begin + length] for begin, length in plan.origins)
    return fold(np.frombuffer(bytes(plan.side), "<u4") - np.frombuffer(before, "<u4"))


def _named(region: Region, at: int) -> Region:
    fields = {name: getattr(region, name) for name in Region.__struct_fields__}
    return Region(**(fields | {"classes": at}))


def _blocks(plan: _Plan, classes: list[Bytes], tables: Tables) -> list[bytes]:
    contexts = [
        part[channel_of(at, min(CHUNK, len(residual) - at), channels=channels, inner=inner)]
        for residual, part, (channels, inner) in zip(plan.residuals, classes, plan.groups, strict=True)
        for at in range(0, len(residual), CHUNK)
    ]
    return encode(np.concatenate(plan.residuals), np.concatenate(contexts), tables)


def _choose_tables(residuals: list[Bytes], groups: list[tuple[int, int]]) -> tuple[Tables | None, list[Bytes]]:
    """How many tables, and which channel uses which: what makes the whole smallest."""
    if not residuals:
        return None, []
    most = _MAX_GROUPS // len(residuals)
    parts = [_counts(data, *group, most=most) for data, group in zip(residuals, groups, strict=True)]
    counts = np.concatenate(parts)
    best: tuple[float, Tables, Bytes] | None = None
    for number in _TABLE_COUNTS:
        if number > len(counts):
            break
        tables, chosen = _cluster(counts, number)
        size = _total_bits(counts, tables, chosen)
        if best is None or size < best[0]:
            best = (size, tables, chosen)
    assert best is not None
    split = np.split(best[2], np.cumsum([len(part) for part in parts])[:-1])
    return best[1], [np.resize(part, channels) for part, (channels, _) in zip(split, groups, strict=True)]


def _counts(data: Bytes, channels: int, inner: int, *, most: int) -> NDArray[np.int64]:
    """How often each byte occurs in each channel, [channels, 256]; in all, [1, 256], where channels are too many or short."""
    if channels > most or len(data) < _LEAST_PER_GROUP * channels:
        return np.bincount(data, minlength=256).reshape(1, 256)
    counts = np.zeros(channels * 256, np.int64)
    for at in range(0, len(data), CHUNK):
        part = data[at : at + CHUNK]
        channel = channel_of(at, len(part), channels=channels, inner=inner)
        counts += np.bincount(channel * 256 + part, minlength=channels * 256)
    return counts.reshape(channels, 256)


def _cluster(counts: NDArray[np.int64], number: int) -> tuple[Tables, Bytes]:
    """Channels in groups that share a table, by code length: Lloyd's algorithm over histograms."""
    distance = np.minimum(np.arange(256), 256 - np.arange(256))
    spread = (counts * distance).sum(axis=1) / np.maximum(1, counts.sum(axis=1))
    order = np.argsort(spread, kind="stable")
    chosen = np.zeros(len(counts), np.int64)
    chosen[order] = np.arange(len(counts)) * number // len(counts)
    for _ in range(_ROUNDS):
        tables = make_tables(_sums(counts, chosen, number))
        again = cost_bits(counts, tables).argmin(axis=1)
        if (again == chosen).all():
            break
        chosen = again
    return make_tables(_sums(counts, chosen, number)), chosen.astype(np.uint8)


def _sums(counts: NDArray[np.int64], chosen: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    sums = np.zeros((number, 256), np.int64)
    np.add.at(sums, chosen, counts)
    return sums


def _total_bits(counts: NDArray[np.int64], tables: Tables, chosen: Bytes) -> float:
    bits = cost_bits(counts, tables)[np.arange(len(chosen)), chosen].sum()
    return float(bits) + 8.0 * (len(save_tables(tables)) + len(pack(chosen.tobytes())))
