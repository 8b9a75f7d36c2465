"""The declaration as a TOML file, typed by hand.

[stream]
name = "motor"
rate_hz = 100
time = "t"                     # seconds; without it samples are counted
columns = [{name = "ax", unit = "g"}, {name = "ay", unit = "g"}]

[[windows]]
name = "w"
length_s = 2.56
hop_s = 1.28
max_missing = 0.1
fill = "linear"

[[inputs]]
kind = "windows"               # windows | samples | log_mel | table | image
name = "x"                     # the model's input
[[inputs.parts]]
window = "w"
aggregates = ["mean", "std", "energy(5, 20)"]
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import UsageError
from edgekit.features.program import Program
from edgekit.schema.features import FeatureSet


def read_declaration(path: Path) -> FeatureSet:
    """Read and check a declaration.

    Raises:
        UsageError: ``features.unreadable``, ``features.malformed``, or what :class:`edgekit.features.program.Program` refuses.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("features.unreadable", f"{path}: not readable as TOML: {error}.") from error
    try:
        features = msgspec.convert(table, FeatureSet)
    except msgspec.ValidationError as error:
        raise UsageError("features.malformed", f"{path}: {error}.", hint="See docs/features.md.") from error
    _refuse_unknown(table, features, str(path))
    try:
        Program(features)
    except UsageError as error:
        raise UsageError(error.code, f"{path}: {error.message}", hint=error.hint) from error
    return features


def _refuse_unknown(table: Any, record: Any, where: str) -> None:
    """A field that the records do not have is a typing error here; in a signed manifest it is a newer version's."""
    if isinstance(table, list):
        for number, (part, made) in enumerate(zip(table, record, strict=True)):
            _refuse_unknown(part, made, f"{where}[{number}]")
    if not isinstance(table, dict):
        return
    fields = list(record.__struct_fields__)
    for name, value in table.items():
        if name == record.__struct_config__.tag_field:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f'Did you mean "{near[0]}"?' if near else f"There are {', '.join(fields)}."
            raise UsageError("features.malformed", f'{where}: there is no field "{name}".', hint=hint)
        _refuse_unknown(value, getattr(record, name), f"{where}, {name}")
