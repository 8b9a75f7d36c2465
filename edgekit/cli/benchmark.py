"""``edgekit benchmark``: models timed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import Progress, format_bytes, note, out, out_json, table, warn
from edgekit.errors import UsageError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
NOISY = 0.05
_COLUMNS = ["model", "size", "peak RSS", "p50 ms", "p90 ms", "p99 ms", "p50 95 %", "ratio", "ratio 95 %", "noise", "verdict"]


def _names(paths: list[Path]) -> list[str]:
    """Short, distinct names: the file's name, with its folders where two are alike, numbered where they are the same."""
    names: list[str] = []
    for path in paths:
        alike = {other for other in paths if other.name == path.name}
        name = str(path) if len(alike) > 1 else path.name
        count = names.count(name) + sum(1 for used in names if used.startswith(f"{name} ("))
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _find_baseline(wanted: str, names: list[str], paths: list[Path]) -> str:
    if not wanted:
        return names[0]
    for name, path in zip(names, paths, strict=True):
        if wanted in {name, str(path)}:
            return name
    raise UsageError("benchmark.baseline", f"{wanted}: not among the models.", hint=f"Choose from {', '.join(names)}.")


def _make_requests(data: str | None, sessions: Mapping[str, Any], batch: int) -> dict[str, dict[str, Any]]:
    """The request of each session: the first one's, fitted to the others."""
    from edgekit.benchmark.request import fit_request, make_request, take_samples

    first = next(iter(sessions.values())).inputs
    if data is None:
        request = make_request(first, batch=batch)
    else:
        from edgekit.dataset.load import load_dataset

        request = take_samples(load_dataset(data, first).inputs, first, batch=batch)
    requests = {}
    for name, session in sessions.items():
        requests[name], is_same = fit_request(request, session.inputs, name=name, batch=batch)
        if not is_same and data is not None:
            warn(f"{name} takes its input in another form: it is timed on random values")
    return requests


@app.command()
def benchmark(
    models: list[Path] = typer.Argument(..., help="Model files: .onnx or .tflite."),
    data: str | None = typer.Option(None, "--data", help="Data for the request.  [default: random values of the right shape]"),
    baseline: str = typer.Option("", "--baseline", help="The model to compare with.  [default: the first]"),
    threads: int = typer.Option(1, "--threads", min=1, help="Intra-op threads."),
    batch: int = typer.Option(1, "--batch", min=1, help="Samples in a request, where the model's batch is free."),
    seconds: float = typer.Option(2.0, "--seconds", min=0.0, max=3600.0, help="Time for each model."),
    runs: int = typer.Option(50, "--runs", min=2, help="At least so many runs of each."),
    seed: int = typer.Option(0, "--seed", min=0, help="Draws the order within the rounds."),
    json: bool = typer.Option(False, "--json", help="Print the latency reports as JSON."),
) -> None:
    """Time models against each other: interleaved, warmed up, with confidence intervals and the noise floor.

    p50, p90 and p99 are of single requests. The ratio is to the baseline's median, below 1 is faster; a difference inside its
    interval or inside the noise is a tie. Peak RSS is that of a process of its own which loads and runs the model.
    """
    import msgspec

    from edgekit.benchmark.latency import measure
    from edgekit.benchmark.memory import measure_peak_rss
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    names = _names(models)
    paths = dict(zip(names, models, strict=True))
    base = _find_baseline(baseline, names, models)
    options = SessionOptions(threads=threads)
    sessions = {name: open_session(path, options=options) for name, path in paths.items()}
    requests = _make_requests(data, sessions, batch)
    progress = Progress(is_quiet=json)
    progress.update("measuring memory")
    peaks = {name: measure_peak_rss(path, requests[name], options=options) for name, path in paths.items()}
    reports = measure(
        sessions,
        requests[base],
        baseline=base,
        twin=open_session(paths[base], options=options),
        requests=requests,
        is_on_target=True,  # no target was named: the host is what is measured
        threads=threads,
        seconds=seconds,
        min_runs=runs,
        seed=seed,
        on_progress=progress.update,
    )
    progress.clear()
    reports = {name: msgspec.structs.replace(report, peak_rss_mb=peaks[name]) for name, report in reports.items()}
    if json:
        out_json(reports)
        return
    _print_table(reports, paths)
    _print_host(reports, base)


def _print_table(reports: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
    from edgekit.benchmark.latency import compare

    rows = []
    for name, report in reports.items():
        times = [f"{value:.3f}" for value in (report.p50_ms, report.p90_ms, report.p99_ms)]
        ratio = ["", ""]
        if report.ratio is not None:
            ratio = [f"{report.ratio:.3f}", f"{report.ratio_low:.3f}..{report.ratio_high:.3f}"]
        rows.append(
            [
                name,
                format_bytes(paths[name].stat().st_size),
                "" if report.peak_rss_mb is None else f"{report.peak_rss_mb:.1f} MB",
                *times,
                f"{report.p50_low_ms:.3f}..{report.p50_high_ms:.3f}",
                *ratio,
                f"{report.noise:.1%}",
                compare(report),
            ]
        )
    out(table(_COLUMNS, rows, right=[1, 2, 3, 4, 5, 7, 9]))


def _print_host(reports: Mapping[str, Any], base: str) -> None:
    report = reports[base]
    host = report.host
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    runtimes = ", ".join(sorted({f"{item.host.runtime} {item.host.runtime_version}" for item in reports.values()}))
    governor = f", governor {host.governor}" if host.governor else ""
    note()
    note(f"{report.runs} interleaved runs of each, {threads}; noise is the baseline against a second session of itself", "dim")
    note(f"measured on {host.cpu} ({' '.join(host.isa)}), {host.cores} cores{governor}, {runtimes}, {host.os}", "dim")
    if report.noise > NOISY:
        warn("the machine is noisy: close what else runs, or give more --seconds")
