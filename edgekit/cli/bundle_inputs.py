"""What a release says about its inputs: ``bundle contract``, and the ``--contract`` and ``--features`` of ``bundle pack``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import note, out, warn
from edgekit.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgekit.bundle.sampling import OpenedModel
    from edgekit.bundle.writer import Draft, SessionOpener
    from edgekit.dataset.data import Array, Dataset
    from edgekit.features.program import Program
    from edgekit.schema.contract import ColumnSpec, Contract, InputSpec
    from edgekit.schema.features import FeatureSet
    from edgekit.schema.manifest import GoldenFeatures

SHOWN_COLUMNS = 12


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(contract)


def contract(
    source: Path = typer.Argument(..., metavar="DIR|BUNDLE", help="Output folder of edgekit optimize, or an .edgekit file."),
    data: str = typer.Option("", "--data", metavar="DATA", help="Learn ranges, missing shares and categories from this data."),
    features: Path | None = typer.Option(None, "--features", metavar="FILE", help="Names the columns of the model's inputs."),
) -> None:
    """Print the input contract as a TOML file to edit, for "edgekit bundle pack --contract"."""
    from edgekit.dataset.contract import infer_contract, learn_columns
    from edgekit.dataset.contract_file import print_contract
    from edgekit.dataset.load import load_dataset
    from edgekit.schema.tensor import TensorSpec

    known = _known_contract(source)
    if data:
        inputs = [TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in known.inputs]
        samples = load_dataset(data, inputs, class_names=known.labels, is_missing_allowed=True)
        if features is not None:
            known = learn_columns(known, samples, _program(features).names)
        else:
            known = infer_contract(samples, inputs, known.outputs, known.labels, is_each_column=True)
    out(print_contract(known).rstrip("\n"))


def _known_contract(source: Path) -> Contract:
    if source.suffix == ".edgekit":
        from edgekit.bundle.reader import read_bundle

        return read_bundle(source).manifest.contract
    from edgekit.bundle.writer import read_candidate

    return read_candidate(source)[0].contract


def _program(path: Path) -> Program:
    from edgekit.features.declaration import read_declaration
    from edgekit.features.program import Program

    return Program(read_declaration(path))


def check_options(features: Path | None, raw: Path | None, contract_file: Path | None) -> None:
    """Refuse what cannot be read before any work is done."""
    from edgekit.dataset.contract_file import read_contract_file

    if raw is not None and features is None:
        raise UsageError("bundle.raw", "--raw: raw samples of no features.", hint="Give --features DECLARATION.toml, too.")
    if features is not None:
        _program(features)
    if contract_file is not None:
        read_contract_file(contract_file)


def add_inputs(
    draft: Draft,
    *,
    features: Path | None,
    raw: Path | None,
    contract_file: Path | None,
    samples: Dataset | None,
    open_session: SessionOpener,
) -> Draft:
    """The release with what its owner says about its inputs.

    Args:
        draft: not sealed, not signed yet.
        features: the declaration.
        raw: raw samples for golden features; compared with ``samples``, where both have the same number of windows.
        contract_file: reactions by input and column.
        samples: the model's inputs as they were in training or calibration.
        open_session: the runtime.
    """
    from edgekit.bundle.feature_samples import with_contract
    from edgekit.dataset.contract_file import lay_over, read_contract_file

    if features is not None:
        draft = _add_features(draft, _program(features), raw=raw, samples=samples, open_session=open_session)
    if contract_file is not None:
        draft = with_contract(draft, lay_over(draft.manifest.contract, read_contract_file(contract_file)))
    return draft


def _add_features(
    draft: Draft, program: Program, *, raw: Path | None, samples: Dataset | None, open_session: SessionOpener
) -> Draft:
    from edgekit.bundle.feature_samples import add_features, with_contract
    from edgekit.dataset.contract import learn_columns
    from edgekit.dataset.table import read_table
    from edgekit.evaluation.feature_parity import check_fit, draw_columns, make_golden_features

    check_fit(program, draft.manifest.contract)
    if samples is not None:
        draft = with_contract(draft, learn_columns(draft.manifest.contract, samples, program.names))
    if raw is None:
        warn("no --raw: golden features are made of drawn samples; real ones test more")
        columns, source = draw_columns(program), "drawn, no raw samples were given"
    else:
        columns, source = read_table(raw), str(raw.name)
        _compare_with_training(program, columns, samples)

    def make(session: OpenedModel) -> GoldenFeatures:
        return make_golden_features(program, columns, session.run, source=source)

    return add_features(draft, program.features, make=make, open_session=open_session)


def _compare_with_training(program: Program, columns: dict[str, Array], samples: Dataset | None) -> None:
    """Where --raw and --data have the same number of windows, they are the same windows: to the last bit."""
    import numpy as np

    from edgekit.features.compute import compute

    if samples is None:
        return
    made = compute(columns, program)
    if len(made) != len(samples):
        note(f"--raw makes {len(made)} windows, --data has {len(samples)}: not compared with each other", "dim")
        return
    for name, array in made.inputs.items():
        if not np.array_equal(array, samples.inputs[name], equal_nan=True):
            rows = np.flatnonzero((array != samples.inputs[name]).reshape(len(array), -1).any(axis=1))
            raise DataError(
                "features.training",
                f'input "{name}": {len(rows)} of {len(array)} windows of --raw differ from --data, the first is {rows[0]}.',
                hint='The model was trained on other features: make them with "edgekit features compute".',
            )
    note(f"the features of --raw are those of --data: {len(made)} windows, equal to the last bit", "dim")


# --- shown by inspect -------------------------------------------------------------------------------------------------------


def contract_lines(declared: Contract) -> list[tuple[str, str]]:
    """Inputs with their rules, column by column."""
    lines = []
    for spec in declared.inputs:
        lines.append(("input", f"{spec.name}: {spec.dtype}{list(spec.shape)}{_range(spec)}{_rules(spec)}"))
        lines += [
            ("column", f"{spec.name}.{column.name}:{_range(column) or ' any'}{_rules(column)}")
            for column in spec.columns[:SHOWN_COLUMNS]
        ]
        if more := spec.columns[SHOWN_COLUMNS:]:
            lines.append(("column", f"... and {len(more)} more (all of them with --json)"))
    if declared.violation_share is not None:
        lines.append(("violations", f"an event above {declared.violation_share:g} of the samples"))
    return lines


def _range(spec: InputSpec | ColumnSpec) -> str:
    low, high = spec.minimum, spec.maximum
    if low is None and high is None:
        return ""
    return f" in {'' if low is None else f'{low:g}'}..{'' if high is None else f'{high:g}'}"


def _rules(spec: InputSpec | ColumnSpec) -> str:
    """The reactions that are not the usual ones."""
    parts = []
    if spec.out_of_range not in (None, "pass"):
        parts.append(f"out of range: {spec.out_of_range}")
    if spec.missing not in (None, "reject"):
        parts.append(f"missing: {spec.missing}")
    if spec.missing_value is not None:
        parts.append(f"{spec.missing_value:g} means missing")
    if spec.fill is not None:
        parts.append(f"filled with {spec.fill:g}")
    if spec.categories:
        known = ", ".join(f"{code:g}" for code in spec.categories[:8])
        parts.append(
            f"categories {known}{', ...' if len(spec.categories) > 8 else ''} (others: {spec.unknown or 'as the input'})"
        )
    return f" ({'; '.join(parts)})" if parts else ""


def feature_lines(features: FeatureSet | None, golden: Sequence[GoldenFeatures | None] = ()) -> list[tuple[str, str]]:
    """How the inputs are made of raw samples."""
    from edgekit.features.program import Program

    if features is None:
        return []
    program = Program(features)
    lines = []
    if program.stream is not None and program.is_streamed:
        stream = program.stream
        units = [f"{column.name} [{column.unit}]" if column.unit else column.name for column in stream.columns]
        lines.append(("stream", f"{stream.name}: {', '.join(units)} at {stream.rate_hz:g} Hz"))
        for plan in program.windows.values():
            text = (
                f"{plan.name}: {plan.length} samples every {plan.hop}, {plan.max_missing:.0%} may be missing, fill {plan.fill}"
            )
            lines.append(("window", text))
    for spec in program.tensors:
        names = program.names.get(spec.name, ())
        shown = f": {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else ""
        lines.append(("features", f"{spec.name} {spec.dtype}{list(spec.shape)}{shown}"))
    for made in golden:
        if made is not None:
            how = "equal to the last bit" if made.is_exact else "equal within roundings"
            lines.append(("parity", f"{len(made.expected)} golden features of {made.source or 'raw samples'}, {how}"))
    return lines
