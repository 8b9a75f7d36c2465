"""Steps and aggregates as they are typed: ``"log1p"``, ``"clip(-5, 5)"``, ``"one_hot(idle, run)"``.

>>> parse_call("quantile(0.9)", what="aggregate")
Call(name='quantile', arguments=('0.9',), text='quantile(0.9)')
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.errors import UsageError

_CALL = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\((.*)\))?\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A name with arguments, as text; ``text`` is its canonical form, without spaces."""

    name: str
    arguments: tuple[str, ...]
    text: str

    @property
    def numbers(self) -> tuple[float, ...]:
        """The arguments as numbers.

        Raises:
            UsageError: ``features.call`` when one is none.
        """
        try:
            return tuple(float(argument) for argument in self.arguments)
        except ValueError:
            raise UsageError("features.call", f'"{self.text}": its arguments are numbers.') from None


def parse_call(text: str, *, what: str) -> Call:
    """Read one call.

    Raises:
        UsageError: ``features.call`` when it is not of the form ``name`` or ``name(a, b)``.
    """
    match = _CALL.match(text)
    if match is None:
        raise UsageError("features.call", f'"{text}": not an {what}; expected for example "clip(-5, 5)".')
    listed = [argument.strip() for argument in match[2].split(",")] if match[2] and match[2].strip() else []
    canonical = f"{match[1]}({','.join(listed)})" if listed else match[1]
    return Call(match[1], tuple(listed), canonical)


def check_call(call: Call, known: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Refuse an unknown name or a wrong number of arguments.

    Args:
        call: what was typed.
        known: by name, the numbers of arguments that are allowed; empty: one or more.
        what: "step" or "aggregate".

    Raises:
        UsageError: ``features.call``.
    """
    counts = known.get(call.name)
    if counts is None:
        near = difflib.get_close_matches(call.name, known, n=1)
        hint = f'Did you mean "{near[0]}"?' if near else f"There are {', '.join(known)}."
        raise UsageError("features.call", f'"{call.text}": no such {what}.', hint=hint)
    if len(call.arguments) not in counts if counts else not call.arguments:
        expected = " or ".join(str(count) for count in counts) or "one or more"
        raise UsageError("features.call", f'"{call.text}": {len(call.arguments)} arguments, expected {expected}.')
