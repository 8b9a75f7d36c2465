"""``edgekit benchmark``: models timed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import Progress, note, out, out_json, paint, table
from edgekit.errors import DataError, UsageError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _names(paths: list[Path]) -> list[str]:
    """Short, distinct names: the file's name, with its folders where two are alike, numbered where they are the same."""
    names: list[str] = []
    for path in paths:
        alike = sum(other.name == path.name for other in paths) > 1
        name = str(path) if alike else path.name
        count = names.count(name) + sum(1 for used in names if used.startswith(f"{name} ("))
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _random_feeds(specs: Any, batch: int) -> dict[str, Any]:
    """Inputs of the right type and shape: uniform floats in 0..1, small integers."""
    import numpy as np

    generator = np.random.default_rng(0)
    feeds = {}
    for spec in specs:
        shape = [
            batch if i == 0 and isinstance(axis, str) else 1 if isinstance(axis, str) else axis
            for i, axis in enumerate(spec.shape)
        ]
        if spec.dtype.startswith("float"):
            feeds[spec.name] = generator.random(shape, np.float32).astype(spec.dtype)
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def _feeds(data: str | None, sessions: Mapping[str, Any], batch: int) -> dict[str, Any]:
    first_name, first = next(iter(sessions.items()))
    expected = {(spec.name, spec.dtype) for spec in first.inputs}
    for name, session in sessions.items():
        if {(spec.name, spec.dtype) for spec in session.inputs} != expected:
            message = f"{name}: its inputs differ from those of {first_name}; one request must fit every model."
            raise DataError("benchmark.inputs_differ", message, hint="Compare models with the same inputs.")
    if data is None:
        return _random_feeds(first.inputs, batch)
    from edgekit.dataset.load import load_dataset

    loaded = load_dataset(data, first.inputs)
    return {name: value[:batch] for name, value in loaded.inputs.items()}


def verdict(report: Any) -> str:
    """What a ratio means: a difference inside the interval or the noise is a tie."""
    if report.ratio is None:
        return "baseline"
    if report.ratio_low <= 1 <= report.ratio_high or abs(report.ratio - 1) <= max(report.noise, MIN_NOISE):
        return "tie"
    return "faster" if report.ratio < 1 else "slower"


MIN_NOISE = 0.01
"""Two sessions of the very same file differ by up to a percent; less is never a difference."""


@app.command()
def benchmark(
    models: list[Path] = typer.Argument(..., help="Model files: .onnx or .tflite."),
    data: str | None = typer.Option(None, "--data", help="Data for the request.  [default: random values of the right shape]"),
    baseline: str = typer.Option("", "--baseline", help="The model to compare with.  [default: the first]"),
    threads: int = typer.Option(1, "--threads", min=1, help="Intra-op threads."),
    batch: int = typer.Option(1, "--batch", min=1, help="Samples in a request, where the model's batch is free."),
    seconds: float = typer.Option(2.0, "--seconds", min=0.0, help="Time for each model."),
    runs: int = typer.Option(50, "--runs", min=2, help="At least so many runs of each."),
    seed: int = typer.Option(0, "--seed", help="Draws the order within the rounds."),
    json: bool = typer.Option(False, "--json", help="Print the latency reports as JSON."),
) -> None:
    """Time models against each other: interleaved, warmed up, with confidence intervals and the noise floor.

    p50, p90 and p99 are of single requests. The ratio is to the baseline's median, below 1 is faster; a difference inside its
    interval or inside the noise is a tie.
    """
    from edgekit.benchmark.latency import measure
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    names = _names(models)
    if baseline and baseline not in names and baseline not in [str(path) for path in models]:
        raise UsageError("benchmark.baseline", f"{baseline}: not among the models.", hint=f"Choose from {', '.join(names)}.")
    base = baseline if baseline in names else names[[str(path) for path in models].index(baseline)] if baseline else names[0]
    options = SessionOptions(threads=threads)
    sessions = {name: open_session(path, options=options) for name, path in zip(names, models, strict=True)}
    twin = open_session(models[names.index(base)], options=options)
    feeds = _feeds(data, sessions, batch)
    progress = Progress(is_quiet=json)
    reports = measure(
        sessions,
        feeds,
        baseline=base,
        twin=twin,
        is_on_target=True,
        threads=threads,
        seconds=seconds,
        min_runs=runs,
        seed=seed,
        on_progress=progress.update,
    )
    progress.clear()
    if json:
        out_json(reports)
        return
    _print(reports, base)


def _print(reports: Mapping[str, Any], base: str) -> None:
    rows = []
    for name, report in reports.items():
        interval = "" if report.ratio is None else f"{report.ratio_low:.3f}..{report.ratio_high:.3f}"
        ratio = "" if report.ratio is None else f"{report.ratio:.3f}"
        times = [f"{value:.3f}" for value in (report.p50_ms, report.p90_ms, report.p99_ms)]
        p50_interval = f"{report.p50_low_ms:.3f}..{report.p50_high_ms:.3f}"
        rows.append([name, *times, p50_interval, ratio, interval, verdict(report)])
    headers = ["model", "p50 ms", "p90 ms", "p99 ms", "p50 95 %", "ratio", "ratio 95 %", "verdict"]
    out(table(headers, rows, right=[1, 2, 3, 5]))
    report = reports[base]
    host = report.host
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    note()
    note(
        f"{report.runs} interleaved runs of each, {threads}; noise floor {report.noise:.1%} (the baseline against itself)",
        "dim",
    )
    note(f"measured on {host.cpu} ({' '.join(host.isa)}), {host.runtime} {host.runtime_version}, {host.os}", "dim")
    if report.noise > 0.05:
        note(paint("the machine is noisy: close what else runs, or give more --seconds", "yellow"))
