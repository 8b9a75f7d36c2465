"""A static range coder over bytes, many lanes at once: interleaved rANS with tables chosen by a context for each byte.

J. Duda, "Asymmetric numeral systems", arXiv:1311.2540; F. Giesen, "Interleaved entropy coders", arXiv:1402.3392. 32-bit states,
16-bit words, probabilities of 12 bits. Symbol i of a block belongs to lane i mod lanes; all lanes advance together, which is
what makes it fast in numpy. Integers only: every machine decodes the same bytes. One block is held at a time; the states go on
from block to block.

    >>> tables = make_tables(np.array([[3, 1, *[0] * 254]]))
    >>> context = np.zeros(4, np.uint8)
    >>> blocks = encode(np.array([0, 1, 0, 0], np.uint8), context, tables)
    >>> Decoder(tables, 4).decode(blocks[0], context).tolist()
    [0, 1, 0, 0]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ArtifactError

BLOCK_BYTES = 1 << 20
"""Symbols of one block."""
MAX_TABLES = 64
_BITS = 12
_TOTAL = 1 << _BITS
_LOW = 1 << 16
_MAX_LANES = 512
_SYMBOLS_PER_LANE = 1024
_SYMBOLS = 256

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Tables:
    """For each context the frequency of each byte, of 4096, and what follows from it."""

    frequencies: NDArray[np.uint64]
    """[contexts, 256]; each row sums to 4096."""
    starts: NDArray[np.uint64]
    """[contexts, 256]: the sum of the frequencies before."""
    symbols: Bytes
    """[contexts * 4096]: which byte a slot means."""


def make_tables(counts: NDArray[np.int64]) -> Tables:
    """Tables for counted bytes, [contexts, 256]; a context without any byte gets a table that is never used."""
    rows = [_normalized(row) for row in counts]
    return tables_of(np.stack(rows))


def _normalized(counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Counts scaled to a sum of 4096; what occurs keeps at least 1."""
    total = int(counts.sum())
    if total == 0:
        alone = np.zeros(_SYMBOLS, np.uint64)
        alone[0] = _TOTAL
        return alone
    scaled = np.maximum(counts * _TOTAL // total, (counts > 0).astype(np.int64))
    while (excess := int(scaled.sum()) - _TOTAL) != 0:
        if excess < 0:
            scaled[int(np.argmax(counts))] -= excess
        else:  # take from the largest, where it costs least
            largest = int(np.argmax(scaled))
            scaled[largest] -= min(excess, int(scaled[largest]) - 1, max(1, int(scaled[largest]) // 8))
    return scaled.astype(np.uint64)


def tables_of(frequencies: NDArray[np.uint64]) -> Tables:
    """Tables of frequencies that are normalized already.

    Raises:
        ArtifactError: ``delta.malformed`` when a row does not sum to 4096.
    """
    if frequencies.ndim != 2 or frequencies.shape[1] != _SYMBOLS or not 1 <= len(frequencies) <= MAX_TABLES:
        raise ArtifactError("delta.malformed", "its tables have a wrong shape.")
    if (frequencies > _TOTAL).any() or (frequencies.sum(axis=1) != _TOTAL).any():
        raise ArtifactError("delta.malformed", "its tables do not sum to what they must.")
    starts = np.cumsum(frequencies, axis=1) - frequencies
    every = np.arange(_SYMBOLS, dtype=np.uint8)
    symbols = np.concatenate([np.repeat(every, row.astype(np.int64)) for row in frequencies])
    return Tables(frequencies, starts.astype(np.uint64), symbols)


def cost_bits(counts: NDArray[np.int64], tables: Tables) -> NDArray[np.float64]:
    """What the counted bytes of each group cost under each table, bits: [groups, contexts]; infinite where impossible."""
    with np.errstate(divide="ignore"):
        bits = _BITS - np.log2(tables.frequencies.astype(np.float64))
    possible = np.where(np.isinf(bits), 1e9, bits)
    found: NDArray[np.float64] = counts.astype(np.float64) @ possible.T
    return found


def _lanes(total: int) -> int:
    return max(1, min(_MAX_LANES, total // _SYMBOLS_PER_LANE))


def encode(data: Bytes, contexts: Bytes, tables: Tables) -> list[bytes]:
    """Blocks of ``BLOCK_BYTES`` symbols: words in the order that they are read, before the first ones the lanes' states."""
    states = np.full(_lanes(len(data)), _LOW, np.uint64)
    blocks = []
    for at in range(0, len(data), BLOCK_BYTES)[::-1]:
        part = slice(at, at + BLOCK_BYTES)
        blocks.append(_encode_block(data[part], contexts[part], tables, states))
    return [states.astype("<u4").tobytes() + blocks[-1], *blocks[-2::-1]] if blocks else []


def _encode_block(data: Bytes, contexts: Bytes, tables: Tables, states: NDArray[np.uint64]) -> bytes:
    """The words of a block, from its last symbol to its first; the states are led on."""
    lanes = len(states)
    words: list[NDArray[np.uint16]] = []
    for step in range(-(-len(data) // lanes))[::-1]:
        part = slice(step * lanes, min(len(data), (step + 1) * lanes))
        symbols, rows = data[part], contexts[part]
        frequency, start = tables.frequencies[rows, symbols], tables.starts[rows, symbols]
        active = states[: len(symbols)]
        full = active >= (frequency << np.uint64(20))
        words.append(active[full].astype(np.uint16))
        active = np.where(full, active >> np.uint64(16), active)
        quotient = active // frequency
        states[: len(symbols)] = (quotient << np.uint64(_BITS)) + (active - quotient * frequency) + start
    return np.concatenate(words[::-1]).astype("<u2").tobytes()


class Decoder:
    """The bytes of the blocks of one delta, in order.

    Args:
        tables: as they were used to encode.
        total: symbols of all blocks.
    """

    def __init__(self, tables: Tables, total: int) -> None:
        self._tables, self._lanes = tables, _lanes(total)
        self._states: NDArray[np.uint64] | None = None

    def decode(self, block: bytes, contexts: Bytes) -> Bytes:
        """The bytes of the next block, one for each context.

        Raises:
            ArtifactError: ``delta.malformed`` when the block is too short or too long.
        """
        if self._states is None:
            head = 4 * self._lanes
            if len(block) < head:
                raise _cut_off()
            self._states = np.frombuffer(block, "<u4", self._lanes).astype(np.uint64)
            block = block[head:]
        if len(block) % 2:
            raise _cut_off()
        return self._decode(np.frombuffer(block, "<u2").astype(np.uint64), contexts, self._states)

    def _decode(self, words: NDArray[np.uint64], contexts: Bytes, states: NDArray[np.uint64]) -> Bytes:
        tables, lanes, count = self._tables, self._lanes, len(contexts)
        out = np.empty(count, np.uint8)
        position = 0
        for step in range(-(-count // lanes)):
            part = slice(step * lanes, min(count, (step + 1) * lanes))
            rows = contexts[part]
            active = states[: len(rows)]
            slots = active & np.uint64(_TOTAL - 1)
            symbols = tables.symbols[(rows.astype(np.int64) << _BITS) + slots.astype(np.int64)]
            out[part] = symbols
            active = tables.frequencies[rows, symbols] * (active >> np.uint64(_BITS)) + slots - tables.starts[rows, symbols]
            empty = np.flatnonzero(active < _LOW)
            if len(empty):
                following = words[position : position + len(empty)]
                if len(following) < len(empty):
                    raise _cut_off()
                active[empty] = (active[empty] << np.uint64(16)) | following
                position += len(empty)
            states[: len(rows)] = active
        if position != len(words):
            raise ArtifactError("delta.malformed", "a coded block is longer than it may be.")
        return out

    def check_end(self) -> None:
        """The coder ends as it began; one damaged word would lead it elsewhere.

        Raises:
            ArtifactError: ``delta.malformed``.
        """
        if self._states is not None and (self._states != _LOW).any():
            raise ArtifactError("delta.malformed", "its coded blocks do not end as they began.")


def _cut_off() -> ArtifactError:
    return ArtifactError("delta.malformed", "a coded block is cut off.")
