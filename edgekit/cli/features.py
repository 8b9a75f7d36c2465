"""``edgekit features``: compute declared features of a table, and prove that a stream of it gives the same."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import note, out, out_json, paint, table
from edgekit.errors import EnvironmentFault, UsageError
from edgekit.schema.base import Record

if TYPE_CHECKING:
    from edgekit.dataset.data import Array
    from edgekit.features.compute import FeatureTable
    from edgekit.features.program import Program

app = typer.Typer(
    help="Declared features: compute them for training, prove that a device gets the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_OUT_SUFFIXES = (".npz", ".parquet", ".pq")


class CheckedChunks(Record, frozen=True, kw_only=True):
    """One row of ``edgekit features check --json``."""

    chunks: str
    windows: int
    values: int
    differing: int


class FeatureCheck(Record, frozen=True, kw_only=True):
    """The whole answer of ``edgekit features check --json``."""

    is_equal: bool
    is_exact_elsewhere: bool
    """Whether other machines get the same bits, too."""
    samples: int
    us_per_sample: float
    """Of a stream in chunks of 64, windows included."""
    us_per_window: float
    rows: tuple[CheckedChunks, ...]


def _program(declaration: Path) -> Program:
    from edgekit.features.declaration import read_declaration
    from edgekit.features.program import Program

    return Program(read_declaration(declaration))


@app.command()
def compute(
    declaration: Path = typer.Argument(..., metavar="DECLARATION", help="The .toml that declares the features."),
    data: Path = typer.Argument(..., metavar="DATA", help="Raw samples: .csv, .parquet or .npz, of a stream oldest first."),
    out_file: Path = typer.Option(..., "--out", metavar="FILE", help="Write the model's inputs: .npz or .parquet."),
    label: str = typer.Option("", "--label", metavar="COLUMN", help='Default: "labels" or "label", where there is one.'),
    group: str = typer.Option(
        "", "--group", metavar="COLUMN", help="Each value is a stream of its own: a recording, a device."
    ),
) -> None:
    """Compute the model's inputs of raw samples: for "edgekit optimize", for training, for a look.

    A window's label is that of the sample that closed it.
    """
    from edgekit.cli.features_data import compute_file, notes_of

    if out_file.suffix.lower() not in _OUT_SUFFIXES:
        raise UsageError("features.out", f"--out {out_file}: expected {' or '.join(_OUT_SUFFIXES[:2])}.")
    program = _program(declaration)
    made = compute_file(program, data, label=label, group=group)
    for text in notes_of(made):
        note(text, "dim")
    _write(out_file, program, made)
    for spec in program.tensors:
        names = program.names.get(spec.name, ())
        shown = f": {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ""
        out(f"{spec.name}  {spec.dtype}[{len(made)}, {', '.join(str(axis) for axis in spec.shape[1:])}]{shown}")


def _write(path: Path, program: Program, made: FeatureTable) -> None:
    from edgekit.durable import write_durably

    data = _npz(made) if path.suffix.lower() == ".npz" else _parquet(program, made)
    try:
        write_durably(path, data)
    except OSError as error:
        raise EnvironmentFault("output.unwritable", f"{path}: cannot be written: {error.strerror}.") from error
    note(f"wrote {path}")


def _npz(made: FeatureTable) -> bytes:
    import numpy as np

    arrays: dict[str, Array] = dict(made.inputs)
    if made.labels is not None:
        is_text = made.labels.dtype.kind == "O"
        arrays["labels"] = made.labels.astype(str) if is_text else made.labels
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _parquet(program: Program, made: FeatureTable) -> bytes:
    """A single input [N, k] as k columns by name; any other as one column of flat lists."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentFault("pyarrow.missing", "writing Parquet needs pyarrow.", hint="pip install pyarrow.") from error
    columns: dict[str, object] = {}
    for name, array in made.inputs.items():
        names = program.names.get(name, ())
        if len(made.inputs) == 1 and array.ndim == 2 and names:
            columns.update({column: array[:, place] for place, column in enumerate(names)})
        else:
            columns[name] = list(array.reshape(len(array), -1))
    if made.labels is not None:
        columns["labels"] = made.labels
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@app.command()
def check(
    declaration: Path = typer.Argument(..., metavar="DECLARATION", help="The .toml that declares the features."),
    data: Path | None = typer.Argument(None, metavar="[DATA]", help="Raw samples; without them noise is drawn."),
    seed: int = typer.Option(0, "--seed", help="Of drawn chunks and samples."),
    json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
) -> int:
    """Prove that a stream gives what the table gives, to the last bit, whatever the chunks. Exit 1: it does not."""
    from edgekit.evaluation.feature_parity import compare_chunks, draw_columns

    program = _program(declaration)
    if data is None:
        columns = draw_columns(program, seed=seed)
    else:
        from edgekit.dataset.table import read_table

        columns = read_table(data)
    if not program.is_streamed:
        return _check_requests(program, columns)
    rows = compare_chunks(columns, program, seed=seed)
    samples = len(columns[program.raw_columns[0]])
    seconds, windows = _time(program, columns)
    result = FeatureCheck(
        is_equal=not any(row.differing for row in rows),
        is_exact_elsewhere=program.is_exact,
        samples=samples,
        us_per_sample=seconds / samples * 1e6,
        us_per_window=seconds / max(1, windows) * 1e6,
        rows=tuple(
            CheckedChunks(chunks=row.chunks, windows=row.windows, values=row.values, differing=row.differing) for row in rows
        ),
    )
    if json:
        out_json(result)
        return 0 if result.is_equal else 1
    cells = [[row.chunks, str(row.windows), str(row.values), str(row.differing)] for row in rows]
    out(table(["chunks of", "windows", "values", "that differ"], cells, right=[1, 2, 3]))
    verdict = paint("equal to the last bit", "green") if result.is_equal else paint("NOT equal", "red", "bold")
    where = "on every machine" if program.is_exact else "on this machine; spectra and logarithms elsewhere within a rounding"
    out(f"batch and stream are {verdict}; {where}")
    note(f"{result.us_per_sample:.2f} µs a sample, {result.us_per_window:.0f} µs a window, in chunks of 64, here", "dim")
    return 0 if result.is_equal else 1


def _time(program: Program, columns: dict[str, Array]) -> tuple[float, int]:
    from edgekit.evaluation.feature_parity import push_in_chunks
    from edgekit.features.stream import StreamWindows

    raw = {name: columns[name] for name in program.raw_columns}
    started = time.perf_counter()
    windows = push_in_chunks(StreamWindows(program), raw, (64,))
    return time.perf_counter() - started, len(windows)


def _check_requests(program: Program, columns: dict[str, Array]) -> int:
    """Row by row against all rows at once."""
    whole = program.of_request(columns)
    count = len(next(iter(whole.values())))
    differing = 0
    for row in range(count):
        one = program.of_request({name: columns[name][row : row + 1] for name in program.raw_columns})
        differing += sum(one[name].tobytes() != array[row : row + 1].tobytes() for name, array in whole.items())
    out(f"{count} rows one by one against all at once: {differing} differ")
    return 1 if differing else 0
