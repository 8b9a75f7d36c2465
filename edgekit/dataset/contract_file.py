"""``contract.toml``: what the owner says about a model's inputs, typed by hand, laid over what was learned from data.

Only what is named is changed. Columns are found by name where the contract has them already; else every column of the last axis
is listed, in order. ``edgekit bundle contract`` prints the learned contract in this form, as a start.

    violation_share = 0.05         # an event when more than 5 % of a while's samples broke the contract

    [[inputs]]
    name = "x"
    out_of_range = "clip"          # reject | clip | pass (and count)
    missing = "impute"             # reject | impute | pass

    [[inputs.columns]]
    name = "temperature"
    minimum = -40
    maximum = 85
    missing_value = -999           # means missing, as NaN does
    fill = 21.5
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from edgekit.dataset.data import suggest
from edgekit.dataset.guarding import check_rules
from edgekit.errors import UsageError
from edgekit.schema.contract import ColumnSpec, Contract, InputSpec, OnMissing, OnRange, OnUnknown


class _Hand(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table that is typed by hand: a field that does not exist is a typing error."""


class ColumnText(_Hand, frozen=True, kw_only=True):
    """One column as the file has it. None: not named."""

    name: str
    minimum: float | None = None
    maximum: float | None = None
    out_of_range: OnRange | None = None
    missing: OnMissing | None = None
    missing_value: float | None = None
    fill: float | None = None
    categories: tuple[float, ...] | None = None
    unknown: OnUnknown | None = None
    missing_share: float | None = None


class InputText(ColumnText, frozen=True, kw_only=True):
    """One input as the file has it."""

    columns: tuple[ColumnText, ...] = ()


class ContractText(_Hand, frozen=True, kw_only=True):
    """The whole file."""

    inputs: tuple[InputText, ...] = ()
    violation_share: float | None = None


def read_contract_file(path: Path) -> ContractText:
    """Read the file.

    Raises:
        UsageError: ``contract.unreadable`` or ``contract.malformed``, saying where.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("contract.unreadable", f"{path}: not readable as TOML: {error}.") from error
    try:
        return msgspec.convert(table, ContractText)
    except msgspec.ValidationError as error:
        hint = 'Print one to start from: "edgekit bundle contract DIR > contract.toml".'
        raise UsageError("contract.malformed", f"{path}: {error}.", hint=hint) from error


def lay_over(contract: Contract, text: ContractText) -> Contract:
    """The contract with what the file names.

    Raises:
        UsageError: ``contract.unknown_input``, ``contract.columns``, ``contract.violation_share``, or what
            :func:`edgekit.dataset.guarding.check_rules` refuses.
    """
    share = text.violation_share
    if share is not None and not 0 <= share <= 1:
        raise UsageError("contract.violation_share", f"violation_share = {share:g}: a share is between 0 and 1.")
    named = {each.name: each for each in text.inputs}
    known = [spec.name for spec in contract.inputs]
    for name in named:
        if name not in known:
            what = f'input "{name}": the model has {", ".join(known)}.'
            raise UsageError("contract.unknown_input", what, hint=suggest(name, known))
    inputs = tuple(_lay_input(spec, named[spec.name]) if spec.name in named else spec for spec in contract.inputs)
    kept = contract.violation_share if share is None else share
    changed = msgspec.structs.replace(contract, inputs=inputs, violation_share=kept)
    check_rules(changed)
    return changed


def _named_fields(text: ColumnText) -> dict[str, Any]:
    fields = [name for name in ColumnText.__struct_fields__ if name != "name"]
    return {name: value for name in fields if (value := getattr(text, name)) is not None}


def _lay_input(spec: InputSpec, text: InputText) -> InputSpec:
    return msgspec.structs.replace(spec, columns=_lay_columns(spec, text), **_named_fields(text))


def _lay_columns(spec: InputSpec, text: InputText) -> tuple[ColumnSpec, ...]:
    if not spec.columns:
        return tuple(msgspec.structs.replace(ColumnSpec(name=each.name), **_named_fields(each)) for each in text.columns)
    columns = {column.name: column for column in spec.columns}
    for each in text.columns:
        if each.name not in columns:
            what = f'input "{spec.name}": there is no column "{each.name}".'
            hint = suggest(each.name, list(columns), otherwise=f"Its columns are {', '.join(list(columns)[:8])}.")
            raise UsageError("contract.columns", what, hint=hint)
        columns[each.name] = msgspec.structs.replace(columns[each.name], **_named_fields(each))
    return tuple(columns.values())


def print_contract(contract: Contract) -> str:
    """The contract as a file to edit: what is learned, and every input's reactions."""
    lines = [
        "# What the model may be fed. Edit, then: edgekit bundle pack ... --contract contract.toml",
        '# out_of_range = "reject" | "clip" | "pass"    missing, unknown = "reject" | "impute" | "pass"',
    ]
    if contract.violation_share is not None:
        lines.append(f"violation_share = {_value(contract.violation_share)}")
    for spec in contract.inputs:
        shape = ", ".join(str(axis) for axis in spec.shape)
        lines += ["", f"[[inputs]]  # {spec.dtype} [{shape}]", f"name = {_value(spec.name)}"]
        shown = ["minimum", "maximum", "out_of_range", "missing", "missing_value", "fill", "categories"]
        lines += _lines(spec, [*shown, "unknown"] if spec.categories else shown)
        for column in spec.columns:
            lines += ["", "[[inputs.columns]]", f"name = {_value(column.name)}"]
            lines += _lines(column, [name for name in ColumnText.__struct_fields__ if name != "name"])
    return "\n".join(lines) + "\n"


def _lines(spec: InputSpec | ColumnSpec, names: list[str]) -> list[str]:
    values = {name: getattr(spec, name) for name in names}
    return [
        f"{name} = {_value(value)}" for name, value in values.items() if value not in (None, ()) and name != "missing_share"
    ] + ([f"# missing in the data: {spec.missing_share:.2%}"] if spec.missing_share else [])


def _value(value: Any) -> str:
    match value:
        case tuple():
            return f"[{', '.join(_value(each) for each in value)}]"
        case float():
            return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case _:
            return json.dumps(value, ensure_ascii=False)
