"""``edgekit benchmark``: models timed against each other, and two saved runs compared."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from edgekit.cli import fleet_command
from edgekit.cli.console import Progress, Style, format_bytes, note, out, out_json, paint, table
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.schema.benchmark import BenchmarkRun, ModelChange, RunComparison, ThreadRun
    from edgekit.schema.command import BenchmarkOrder
    from edgekit.schema.measurement import LatencyReport

MAX_THREADS = 1024
_PIPE_COLUMNS = 10_000
_FIGURES = ["p50 ms", "p90 ms", "p99 ms", "ratio", "ratio 95 %", "verdict"]
_FACTS = ["mean ms", "p50 95 %", "size", "peak RSS"]


class _TimingGroup(TyperGroup):
    """Takes models itself; only when the first word is one of its commands, that command gets the rest."""

    allow_interspersed_args = True

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command that the first word names, or of the timing."""
        if args and args[0] in self.commands:
            return self.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


app = typer.Typer(
    cls=_TimingGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    subcommand_metavar="",
)


@app.callback()
def benchmark(
    models: list[Path] = typer.Argument(
        None, help="Model files: .onnx or .tflite; with --device NAME or NAME@VERSION of what lies there.", show_default=False
    ),
    data: str | None = typer.Option(None, "--data", help="Data for the request.", show_default="random values"),
    baseline: str | None = typer.Option(None, "--baseline", help="The model to compare with.", show_default="the first"),
    threads: str = typer.Option("1", "--threads", metavar="N[,N...]", help="Intra-op threads; a run for each of the list."),
    batch: int = typer.Option(1, "--batch", min=1, help="Samples in a request, where the model's batch is free."),
    seconds: float = typer.Option(2.0, "--seconds", min=0.0, max=3600.0, help="Time for each model."),
    runs: int = typer.Option(50, "--runs", min=2, help="At least so many runs of each."),
    seed: int = typer.Option(0, "--seed", min=0, help="Draws the order within the rounds."),
    is_pinned: bool | None = typer.Option(
        None, "--pin/--no-pin", help="Stay on as many CPUs as threads.", show_default="where there are more CPUs"
    ),
    save: Path | None = typer.Option(None, "--save", metavar="FILE", dir_okay=False, help='Keep the run, for "compare".'),
    is_json: bool = typer.Option(
        False, "--json", help="Print the latency reports as JSON, by thread count where there are several."
    ),
    device: str = typer.Option("", "--device", metavar="[SITE/]NAME", help="Time what lies on a device of the fleet, there."),
    keys: list[Path] = typer.Option([], "--key", metavar="KEY", help="With --device: signs the order."),
    broker: str = typer.Option(fleet_command.BROKER, "--broker", metavar="URL", help="With --device: where it is connected."),
    ca_file: str = typer.Option("", "--ca", help="With --device: certificates to trust for mqtts."),
    timeout_s: float = typer.Option(600.0, "--timeout", min=1, metavar="SECONDS", help="With --device: how long to wait."),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="With --device: a broker without TLS off loopback."),
) -> None:
    """Time models against each other: interleaved, warmed up, with confidence intervals and the noise floor.

    p50, p90 and p99 are of single requests. The ratio is to the baseline's median, below 1 is faster; a difference inside its
    interval or inside the noise is a tie. Peak RSS is that of a process of its own which loads and runs the model.

    With --device a device of the fleet times what lies in its slots, on its own hardware, beside the model that serves: without
    a model the one that serves, otherwise NAME or NAME@VERSION.

    "edgekit benchmark compare OLD NEW" compares two runs that were kept with --save.
    """
    from edgekit.benchmark.run_file import write_run

    counts = _parse_threads(threads)
    if device:
        if data is not None or baseline is not None or is_pinned is not None:
            message = "--data, --baseline and --pin do not go with --device: the device has no such file."
            raise UsageError("benchmark.device", message)
        order = _order(models or [], counts, batch=batch, seconds=seconds, runs=runs, seed=seed)
        run = fleet_command.benchmark_on_device(
            device,
            order,
            keys=keys,
            broker=broker,
            ca_file=ca_file,
            timeout_s=timeout_s,
            is_plain_allowed=allow_insecure,
        )
    else:
        run = _run_here(
            models or [],
            data=data,
            baseline=baseline,
            threads=counts,
            batch=batch,
            seconds=seconds,
            runs=runs,
            seed=seed,
            is_pinned=is_pinned,
            is_quiet=is_json,
        )
    if is_json:
        reports = {str(part.threads): part.reports for part in run.runs}
        out_json(reports if len(reports) > 1 else run.runs[0].reports)
    else:
        _print_run(run)
    if save:
        write_run(save, run)
        if not is_json:
            _tell(f'kept as {save}: compare it with "edgekit benchmark compare"', "dim")


def _order(models: Sequence[Path], threads: tuple[int, ...], **more: Any) -> BenchmarkOrder:
    """What a device is asked for, within what a device accepts."""
    import msgspec

    from edgekit.schema.command import BenchmarkOrder

    try:
        return msgspec.convert({"models": [str(model) for model in models], "threads": threads} | more, BenchmarkOrder)
    except msgspec.ValidationError as error:
        raise UsageError("benchmark.device", f"a device does not take that: {error}.") from error


def _run_here(
    models: Sequence[Path],
    *,
    data: str | None,
    baseline: str | None,
    threads: tuple[int, ...],
    batch: int,
    seconds: float,
    runs: int,
    seed: int,
    is_pinned: bool | None,
    is_quiet: bool,
) -> BenchmarkRun:
    """The benchmark on this machine."""
    from edgekit.benchmark.protocol import run_benchmark
    from edgekit.schema.benchmark import BenchmarkRequest

    if not models:
        raise UsageError("benchmark.no_models", "there is nothing to time.", hint="Name a model file, or a --device.")
    request = BenchmarkRequest(
        models=tuple(str(model) for model in models),
        baseline=baseline,
        data=data,
        threads=threads,
        batch=batch,
        seconds=seconds,
        min_runs=runs,
        seed=seed,
        is_pinned=is_pinned,
    )
    progress = Progress(is_quiet=is_quiet)
    run = run_benchmark(request, on_progress=progress.update)
    progress.clear()
    return run


@app.command("compare")
def compare(
    old: Path = typer.Argument(..., help="The earlier run, kept with --save."),
    new: Path = typer.Argument(..., help="The later run."),
    matches: list[str] = typer.Option(
        [], "--match", metavar="OLD=NEW", help="A model that has another name in the new run; may be repeated."
    ),
    limit: float | None = typer.Option(
        None, "--fail-above", min=1.0, metavar="RATIO", help="Exit 1 when a model is slower than this, interval and all."
    ),
    is_json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
) -> int:
    """Compare two kept runs, model by model: faster, slower or a tie.

    A model that is the same file in both runs, the baseline if possible, is the reference: what is compared is each model's
    ratio to it, so that a machine that became slower between the runs does not count. Without one, times are compared as they
    are, and a warning says so.
    """
    from edgekit.benchmark.comparison import compare_runs, find_slower
    from edgekit.benchmark.run_file import read_run

    comparison = compare_runs(read_run(old), read_run(new), matches=_parse_matches(matches))
    if is_json:
        out_json(comparison)
    else:
        _print_comparison(comparison)
    if limit is None:
        return 0
    noise = max(change.noise for change in comparison.changes)
    if noise > limit - 1:
        _tell(f"warning: the noise of the two runs is {noise:.1%}: smaller changes cannot fail; give more --seconds", "yellow")
    slower = find_slower(comparison, limit)
    for change in slower:
        threads = _count_threads(change.threads)
        _tell(
            f"--fail-above {limit:g}: {change.new_name} with {threads} takes {change.ratio:.3f} times as long as before,"
            f" {change.ratio_low:.3f} at least",
            "red",
        )
    return 1 if slower else 0


def _parse_threads(text: str) -> tuple[int, ...]:
    """The thread counts of a comma list, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= MAX_THREADS for part in parts):
        message = f"--threads {text}: expected numbers from 1 to {MAX_THREADS}."
        raise UsageError("benchmark.threads", message, hint="For example --threads 1,2,4.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _parse_matches(texts: Sequence[str]) -> dict[str, str]:
    matches = {}
    for text in texts:
        old, sign, new = text.partition("=")
        if not (old and sign and new):
            message = f"--match {text}: expected OLD=NEW."
            raise UsageError("benchmark.match", message, hint="For example --match fp32.onnx=model.onnx.")
        matches[old] = new
    return matches


def _count_threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _tell(text: str, *styles: Style) -> None:
    """A line for people, filled to the terminal's width."""
    columns = shutil.get_terminal_size().columns if sys.stderr.isatty() else _PIPE_COLUMNS
    for line in textwrap.wrap(text, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
        note(line, *styles)


# --- the tables -------------------------------------------------------------------------------------------------------------


def _decimals(values: Sequence[float]) -> int:
    """So many that the smallest has three significant digits."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(max(2 - math.floor(math.log10(smallest)), 2), 5)


def _figures(report: LatencyReport, decimals: int) -> list[str]:
    from edgekit.benchmark.latency import compare as judge

    ratio = ["", ""]
    if report.ratio is not None:
        ratio = [f"{report.ratio:.3f}", f"{report.ratio_low:.3f}..{report.ratio_high:.3f}"]
    return [*(f"{value:.{decimals}f}" for value in (report.p50_ms, report.p90_ms, report.p99_ms)), *ratio, judge(report)]


def _facts(report: LatencyReport, size_bytes: int, decimals: int) -> list[str]:
    return [
        f"{report.mean_ms:.{decimals}f}",
        f"{report.p50_low_ms:.{decimals}f}..{report.p50_high_ms:.{decimals}f}",
        format_bytes(size_bytes),
        "" if report.peak_rss_mb is None else f"{report.peak_rss_mb:.1f} MB",
    ]


def _width(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return sum(max(len(row[i]) for row in [headers, *rows]) + 2 for i in range(len(headers))) - 2


def _print_run(run: BenchmarkRun) -> None:
    for i, part in enumerate(run.runs):
        if len(run.runs) > 1:
            out(("\n" if i else "") + paint(_count_threads(part.threads), "bold"))
        _print_reports(part, {model.name: model.size_bytes for model in run.models})
        _print_circumstances(part, part.reports[run.baseline])
    for text in run.notes:
        _tell(f"note: {text}", "yellow")
    _print_host(run)


def _print_reports(part: ThreadRun, sizes: Mapping[str, int]) -> None:
    """One table, or two below each other where the terminal is too narrow for one."""
    decimals = _decimals([part.reports[name].p50_ms for name in sizes])
    figures = {name: _figures(part.reports[name], decimals) for name in sizes}
    facts = {name: _facts(part.reports[name], size, decimals) for name, size in sizes.items()}
    headers = ["model", *_FACTS[2:], *_FIGURES[:3], *_FACTS[:2], *_FIGURES[3:]]
    rows = [[name, *facts[name][2:], *figures[name][:3], *facts[name][:2], *figures[name][3:]] for name in sizes]
    columns = shutil.get_terminal_size((_PIPE_COLUMNS, 24)).columns if sys.stdout.isatty() else _PIPE_COLUMNS
    if _width(headers, rows) <= columns:
        out(table(headers, rows, right=[1, 2, 3, 4, 5, 6, 8]))
        return
    out(table(["model", *_FIGURES], [[name, *figures[name]] for name in sizes], right=[1, 2, 3, 4]))
    out()
    out(table(["model", *_FACTS], [[name, *facts[name]] for name in sizes], right=[1, 3, 4]))


def _print_circumstances(part: ThreadRun, report: LatencyReport) -> None:
    where = f"pinned to CPU {', '.join(map(str, part.cpus))}" if part.cpus else "not pinned to CPUs"
    _tell(f"{report.runs:,} interleaved rounds, {_count_threads(part.threads)}, {where}; noise {report.noise:.1%}", "dim")
    for text in part.notes:
        _tell(f"note: {text}", "yellow")


def _print_host(run: BenchmarkRun) -> None:
    host = run.host
    runtimes = {f"{report.host.runtime} {report.host.runtime_version}" for report in run.runs[0].reports.values()}
    governor = f", governor {host.governor}" if host.governor else ""
    isa = " ".join(host.isa)
    _tell(f"measured on {host.cpu} ({isa}), {host.cores} CPUs{governor}, {', '.join(sorted(runtimes))}, {host.os}", "dim")


def _print_comparison(comparison: RunComparison) -> None:
    counts = list(dict.fromkeys(change.threads for change in comparison.changes))
    for i, threads in enumerate(counts):
        if len(counts) > 1:
            out(("\n" if i else "") + paint(_count_threads(threads), "bold"))
        changes = [change for change in comparison.changes if change.threads == threads]
        _print_changes(changes)
        reference = next((change for change in changes if change.change == "reference"), None)
        what = "ratio of new to old"
        if reference:
            what += f", each relative to {reference.new_name}, the same file in both runs, whose own row shows the machine"
        _tell(f"{what}; a change within {changes[0].noise:.1%} is noise", "dim")
    for old, new in dict.fromkeys((change.old_name, change.new_name) for change in comparison.changes):
        if old != new:
            _tell(f"{new} was {old} in the old run", "dim")
    for text in comparison.warnings:
        _tell(f"warning: {text}", "yellow")


def _print_changes(changes: Sequence[ModelChange]) -> None:
    decimals = _decimals([change.new_p50_ms for change in changes])
    rows = [
        [
            change.new_name,
            f"{change.old_p50_ms:.{decimals}f}",
            f"{change.new_p50_ms:.{decimals}f}",
            f"{change.ratio:.3f}",
            f"{change.ratio_low:.3f}..{change.ratio_high:.3f}",
            change.change,
        ]
        for change in changes
    ]
    out(table(["model", "old p50 ms", "new p50 ms", "ratio", "ratio 95 %", "verdict"], rows, right=[1, 2, 3]))
