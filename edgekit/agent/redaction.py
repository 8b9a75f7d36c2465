"""What is taken out of a live input before it may leave the device: rules that the device's owner declares.

    none                  nothing (it must be said)
    drop:INPUT            the whole input
    drop:INPUT.COLUMN     one column of a table, by name or number
    downscale:INPUT:8     every 8 x 8 pixels become one
    blur:INPUT:4          each pixel becomes the mean of those up to 4 pixels away

Redaction fails closed: a rule that names an input or a column that the model does not have takes nothing out, so then no sample
leaves at all.

    >>> rules = parse_rules(("downscale:image:2",))
    >>> import numpy as np
    >>> redact(rules, {"image": np.ones((1, 3, 8, 8), np.float32)}, {})["image"].shape
    (1, 3, 4, 4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Action = Literal["none", "drop", "downscale", "blur"]
MAX_CHANNELS = 4
IMAGE_RANK = 4


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; ``column`` for tables, ``size`` in pixels for images."""

    action: Action
    tensor: str = ""
    column: str = ""
    size: int = 0

    @property
    def text(self) -> str:
        """As it is declared."""
        place = f"{self.tensor}.{self.column}" if self.column else self.tensor
        return ":".join(filter(None, (self.action, place, str(self.size or ""))))


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that somebody declared.

    Raises:
        UsageError: ``config.invalid`` for one that is none.
    """
    return tuple(map(_parse, texts))


def _parse(text: str) -> Rule:
    action, *rest = text.split(":")
    if action == "none" and not rest:
        return Rule(action="none")
    if action == "drop" and len(rest) == 1 and rest[0]:
        tensor, _, column = rest[0].partition(".")
        return Rule(action="drop", tensor=tensor, column=column)
    if action in {"downscale", "blur"} and len(rest) == 2 and rest[0] and rest[1].isdecimal() and int(rest[1]) > 0:
        return Rule(action=cast("Action", action), tensor=rest[0], size=int(rest[1]))
    raise UsageError(
        "config.invalid",
        f"[samples] redact {text!r}: not a rule.",
        hint='Use "none", "drop:INPUT", "drop:INPUT.COLUMN", "downscale:INPUT:8" or "blur:INPUT:4".',
    )


def redact(
    rules: Sequence[Rule], feeds: Mapping[str, NDArray[Any]], columns: Mapping[str, Sequence[str]]
) -> dict[str, NDArray[Any]] | None:
    """The inputs after every rule; the given ones are left as they are.

    Args:
        rules: in order.
        feeds: tensors [N, ...].
        columns: names of the columns of tables.

    Returns:
        None when a rule cannot be followed, so that nothing may leave.
    """
    kept = dict(feeds)
    for rule in rules:
        if rule.action == "none":
            continue
        if rule.tensor not in feeds:
            return None
        if rule.tensor not in kept:
            continue
        if rule.action == "drop" and not rule.column:
            del kept[rule.tensor]
            continue
        changed = _apply(rule, kept[rule.tensor], columns.get(rule.tensor, ()))
        if changed is None:
            return None
        kept[rule.tensor] = changed
    return kept


def _apply(rule: Rule, tensor: NDArray[Any], columns: Sequence[str]) -> NDArray[Any] | None:
    if rule.action == "drop":
        return _blank(tensor, rule.column, columns)
    if tensor.ndim != IMAGE_RANK:
        return None
    rows, across = (2, 3) if tensor.shape[1] <= MAX_CHANNELS else (1, 2)
    if rule.action == "downscale":
        return _downscale(tensor, rule.size, (rows, across))
    return _blur(tensor, rule.size, (rows, across))


def _blank(tensor: NDArray[Any], column: str, columns: Sequence[str]) -> NDArray[Any] | None:
    """A column without its values: NaN, or 0 where there is none."""
    import numpy as np  # noqa: PLC0415 - the supervisor reads rules, too

    place = columns.index(column) if column in columns else int(column) if column.isdecimal() else -1
    if tensor.ndim < 2 or not 0 <= place < tensor.shape[-1]:
        return None
    blank = tensor.copy()
    blank[..., place] = np.nan if tensor.dtype.kind == "f" else 0
    return blank


def _downscale(tensor: NDArray[Any], size: int, axes: tuple[int, int]) -> NDArray[Any]:
    """Means of blocks; what is left over at the edges goes."""
    import numpy as np  # noqa: PLC0415 - the supervisor reads rules, too

    part = tensor
    for axis in axes:
        length = part.shape[axis] // size * size
        if not length:
            part = part.mean(axis=axis, keepdims=True)
            continue
        part = np.take(part, range(length), axis=axis)
        shape = (*part.shape[:axis], length // size, size, *part.shape[axis + 1 :])
        part = part.reshape(shape).mean(axis=axis + 1)
    return part.astype(tensor.dtype)


def _blur(tensor: NDArray[Any], radius: int, axes: tuple[int, int]) -> NDArray[Any]:
    """Box blur along both axes, edges repeated."""
    import numpy as np  # noqa: PLC0415 - the supervisor reads rules, too

    part = tensor.astype(np.float64)
    for axis in axes:
        padding = [(radius, radius) if at == axis else (0, 0) for at in range(part.ndim)]
        sums = np.cumsum(np.pad(part, padding, mode="edge"), axis=axis)
        sums = np.concatenate([np.zeros_like(np.take(sums, [0], axis=axis)), sums], axis=axis)
        width, length = 2 * radius + 1, part.shape[axis]
        upper = np.take(sums, range(width, width + length), axis=axis)
        part = (upper - np.take(sums, range(length), axis=axis)) / width
    return part.astype(tensor.dtype)
