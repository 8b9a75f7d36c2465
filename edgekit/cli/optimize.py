"""``edgekit optimize``: find the fastest form of a model that meets a budget on a target."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import Progress, format_seconds, note, out, out_json, paint, table, warn
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.compiler.preparation import OptimizeRequest
    from edgekit.compiler.result import OptimizeResult
    from edgekit.schema.candidate import Candidate
    from edgekit.schema.variants import MadeVariant

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
EFFORTS = ("fast", "default", "max")
MARKS = {"chosen": "chosen", "passed": "meets", "missed": "misses", "failed": "failed"}


@app.command()
def optimize(
    model: str = typer.Argument(help="An .onnx file, package.module:factory or file.py:factory (torch), or a TrainTask."),
    target: list[str] = typer.Option(
        ..., "--target", "-t", help="Name of a target profile, or a .toml file; host is this machine. Several make variants."
    ),
    data: str = typer.Option(
        ..., "--data", "-d", help="Calibration data: .npz, folder of images, .csv, .parquet, module:function."
    ),
    evaluation: str | None = typer.Option(None, "--eval", help="Evaluation data; without it the calibration data is used."),
    metric: str | None = typer.Option(None, help="top1, agreement, sqnr_db, … or module:function."),
    budget: str | None = typer.Option(None, help='For example "top1_drop<=0.01, latency_ms<=5, size_mb<=2".'),
    output: Path | None = typer.Option(None, "--out", "-o", help="Output folder; default edgekit-out/<model>-<target>."),
    effort: str = typer.Option("default", help="fast, default or max."),
    seed: int = typer.Option(0, help="Of everything that is drawn at random."),
    weights: Path | None = typer.Option(None, help="State dict of a torch model."),
    shapes: list[str] = typer.Option(
        [], "--input", metavar="NAME=SHAPE", help="name=1,3,224,224 of a torch model without example inputs."
    ),
    threads: int | None = typer.Option(None, min=1, help="Threads of the timing; default: the target's."),
    labels: Path | None = typer.Option(None, help="File with the names of the classes, one a line."),
    time_limit: float | None = typer.Option(
        None, "--time-limit", min=1.0, metavar="SECONDS", help="For the whole run: the best so far wins."
    ),
    latency_table: Path | None = typer.Option(
        None,
        "--latency-table",
        metavar="FILE",
        help="Times of nodes measured on the target: DIR/latency-table.json of a run there.",
    ),
    previous: Path | None = typer.Option(
        None,
        "--previous",
        metavar="DIR|ONNX",
        help="The previous release: offer a candidate that keeps its scales, and prefer it in a tie if its update is smaller.",
    ),
    is_strict: bool = typer.Option(
        False, "--strict", help="Exit 1 too when the runtime does not run the chosen file as it was meant (edgekit inspect)."
    ),
    is_json: bool = typer.Option(False, "--json", help="Print the chosen candidate's record (or the plan) as JSON."),
    is_dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan of candidates and stop."),
    is_quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress on stderr."),
) -> int:
    """Find the fastest form of MODEL that meets the budget on the target, and prove it.

    Every candidate is made, evaluated on the same data and timed in one interleaved run. Exit 0: the budget is met. Exit 1: it
    is not; the best candidate is written all the same. With several targets each has its folder below the output folder, and
    edgekit bundle pack makes one release of them.
    """
    from edgekit.compiler.preparation import OptimizeRequest

    if effort not in EFFORTS:
        raise UsageError("effort.unknown", f"{effort}: no such effort.", hint=f"Choose from {', '.join(EFFORTS)}.")
    request = OptimizeRequest(
        model=model,
        target=target[0],
        data=data,
        evaluation=evaluation,
        metric=metric,
        budget=budget,
        out=output,
        effort=effort,  # type: ignore[arg-type]
        seed=seed,
        weights=weights,
        input_shapes=_parse_shapes(shapes),
        labels=_read_labels(labels),
        threads=threads,
        time_limit=time_limit,
        latency_table=latency_table,
        previous=previous,
        update_bytes=_update_bytes,
    )
    if len(target) > 1:
        requests = _requests_by_target(request, target)
        return _run_several(requests, is_dry_run=is_dry_run, is_json=is_json, is_quiet=is_quiet, is_strict=is_strict)
    if is_dry_run:
        plan = _print_plan(request, is_json=is_json, is_quiet=is_quiet)
        if is_json:
            out_json(plan)
        return 0
    return _run(request, is_json=is_json, is_quiet=is_quiet, is_strict=is_strict)


def _requests_by_target(request: OptimizeRequest, targets: list[str]) -> dict[str, OptimizeRequest]:
    """One request a target, each with a folder of its own below the output folder.

    Raises:
        UsageError: ``target.twice``.
    """
    from edgekit.compiler.output import default_out
    from edgekit.compiler.source import stem_of
    from edgekit.target.load import load_target

    names = [load_target(text).name for text in targets]
    if len(set(names)) != len(names):
        raise UsageError("target.twice", f"--target {', '.join(names)}: a target is named twice.", hint="Name each once.")
    base = request.out or default_out(stem_of(request.model), "variants")
    own = replace(request, work=base)
    return {
        name: replace(own, target=text, out=base / name, previous=_previous_of(request.previous, name))
        for name, text in zip(names, targets, strict=True)
    }


def _previous_of(previous: Path | None, target: str) -> Path | None:
    """The previous release for one of several targets; a run for several has a folder for each."""
    from edgekit.schema.base import decode_json
    from edgekit.schema.variants import VARIANTS_FILE, VariantList

    listing = previous / VARIANTS_FILE if previous is not None else None
    if previous is None or listing is None or not listing.is_file():
        return previous
    made = decode_json(listing.read_bytes(), VariantList, name=str(listing)).variants
    found = next((previous / each.folder for each in made if each.target == target), None)
    if found is None:
        warn(f"{listing}: has no variant for {target}, so no scales are kept for it")
    return found


def _update_bytes(previous: Path, model: Path) -> int:
    """What a device with the previous model downloads: the delta that would be published, or the whole."""
    from edgekit.bundle.delta.make import make_delta

    made = make_delta(previous, model)
    return len(made.content) if made else model.stat().st_size


def _run_several(
    requests: dict[str, OptimizeRequest], *, is_dry_run: bool, is_json: bool, is_quiet: bool, is_strict: bool
) -> int:
    """Optimize for one target after the other, and list the results for ``bundle pack``."""
    from edgekit.durable import write_durably
    from edgekit.schema.base import encode_json
    from edgekit.schema.variants import VARIANTS_FILE, VariantList

    plans: list[dict[str, object]] = []
    results: list[tuple[OptimizeResult, bool]] = []
    for number, (name, request) in enumerate(requests.items(), 1):
        note(f"target {number} of {len(requests)}: {name}", "bold")
        if is_dry_run:
            plan = _print_plan(request, is_json=is_json, is_quiet=is_quiet)
            plans.append(plan)
            continue
        results.append(_optimize(request, is_json=is_json, is_quiet=is_quiet, is_strict=is_strict))
    if is_dry_run:
        if is_json:
            out_json(plans)
        return 0
    base = next(iter(requests.values())).out
    assert base is not None, "every target's folder was named"
    base = base.parent
    made = [_made_variant(result) for result, _ in results]
    write_durably(base / VARIANTS_FILE, encode_json(VariantList(variants=tuple(made))))
    if is_json:
        out_json([result.chosen for result, _ in results])
    else:
        _print_variants([result for result, _ in results], base)
    return 0 if all(is_good for _, is_good in results) else 1


def _made_variant(result: OptimizeResult) -> MadeVariant:
    """The line of the list, with the rules that the target asks for."""
    from edgekit.bundle.selection import RUNTIME_OF, requires_of
    from edgekit.schema.variants import MadeVariant

    artifact = result.chosen.artifact
    assert artifact is not None, "the chosen candidate has a model"
    rules = requires_of(
        result.target,
        precision=artifact.precision,
        runtime=RUNTIME_OF[artifact.format],
        runtime_version=result.host.runtime_version,
        ram_mb=result.chosen.latency.peak_rss_mb if result.chosen.latency else None,
    )
    return MadeVariant(
        target=result.target.name,
        folder=result.target.name,
        candidate=result.chosen.name,
        is_budget_met=result.is_budget_met,
        requires=rules,
    )


def _print_variants(results: list[OptimizeResult], base: Path) -> None:
    rows = []
    for result in results:
        chosen = result.chosen
        size = f"{chosen.artifact.size_bytes / 1000:.1f}" if chosen.artifact else "-"
        latency = chosen.latency
        where = "measured" if latency and latency.is_on_target else "host"
        time = f"{latency.p50_ms:.3f} ({where})" if latency else "-"
        rows.append([result.target.name, chosen.name, time, size, "met" if result.is_budget_met else "missed"])
    out()
    out(table(["target", "candidate", "p50 ms", "kB", "budget"], rows, right=[3]))
    out(f"one release of them: edgekit bundle pack {base} --name NAME --version VERSION --key KEY")


def _run(request: OptimizeRequest, *, is_json: bool, is_quiet: bool, is_strict: bool) -> int:
    result, is_good = _optimize(request, is_json=is_json, is_quiet=is_quiet, is_strict=is_strict)
    if is_json:
        out_json(result.chosen)
    return 0 if is_good else 1


def _optimize(request: OptimizeRequest, *, is_json: bool, is_quiet: bool, is_strict: bool) -> tuple[OptimizeResult, bool]:
    """Run, tell about it but for JSON, and say whether the answer is yes."""
    from edgekit.compiler.output import WORK, default_out
    from edgekit.compiler.pipeline import optimize as run

    progress = Progress(is_quiet=is_quiet)
    try:
        result = run(request, lambda event: progress.update(event.stage, event.done))
    except KeyboardInterrupt:
        progress.clear()
        kept_in = request.work or request.out
        where = f"{kept_in}/{WORK}" if kept_in else f"edgekit-out/…/{WORK}"
        note(f"interrupted: what is finished is kept in {where}; the same command goes on from there", "yellow")
        raise
    progress.clear()
    folder = request.out or default_out(_stem_of(result), result.target.name)
    for text in result.warnings:
        warn(text)
    if not is_json:
        _print_result(result, folder)
    unmeant = _find_unmeant(result) if is_strict else []
    for text in unmeant:
        note(f"--strict: {text}", "red")
    return result, result.is_budget_met and not unmeant


def _find_unmeant(result: OptimizeResult) -> list[str]:
    """What the runtime does with the chosen file that was not meant; conversions that merely cost time are not among it."""
    audit = result.findings.audits.get(result.chosen.name)
    return [finding.text for finding in audit.findings if finding.kind != "conversion"] if audit else []


def _stem_of(result: OptimizeResult) -> str:
    from edgekit.compiler.source import stem_of

    return stem_of(result.request.model)


def _parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """``name=1,3,224,224`` as a shape by name.

    Raises:
        UsageError: ``input.unparsable``.
    """
    shapes = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        parts = numbers.replace("x", ",").split(",")
        if not name or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise UsageError(
                "input.unparsable", f"--input {text}: expected name=shape.", hint="For example --input image=1,3,224,224."
            )
        shapes[name.strip()] = tuple(int(part) for part in parts)
    return shapes


def _read_labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "labels.unreadable", f"{path}: cannot be read: {error}.", hint="A text file with one class name a line."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UsageError(
            "labels.unreadable", f"{path}: has no class names.", hint="One class name a line, in the classes' order."
        )
    return names


def _print_plan(request: OptimizeRequest, *, is_json: bool, is_quiet: bool) -> dict[str, object]:
    """The plan that the run would execute, printed but for JSON; the output folder is checked and not touched."""
    from edgekit.compiler.output import check_out, default_out
    from edgekit.compiler.preparation import Reporter, plan_candidates, prepare

    progress = Progress(is_quiet=is_quiet)
    with tempfile.TemporaryDirectory(prefix="edgekit-plan-") as folder:
        elsewhere = replace(request, out=Path(folder) / "out", work=None)
        prepared = prepare(elsewhere, Reporter(lambda event: progress.update(event.stage, event.done)))
        planned = plan_candidates(prepared)
    progress.clear()
    folder_name = request.out or default_out(prepared.source.stem, prepared.target.name)
    check_out(folder_name)
    for text in prepared.warnings:
        warn(text)
    budget = prepared.budget.text if prepared.budget else f"default for {prepared.metric.name}"
    plan = [
        {"name": item.recipe.name, "passes": [spec.describe() for spec in item.recipe.passes], "obstacle": item.obstacle}
        for item in planned
    ]
    facts = {"target": prepared.target.name, "metric": prepared.metric.name, "budget": budget, "output": str(folder_name)}
    whole: dict[str, object] = {**facts, "candidates": plan}
    if is_json:
        return whole
    rows = [
        [item.recipe.name, " + ".join(spec.describe() for spec in item.recipe.passes) or "-", item.obstacle or "yes"]
        for item in planned
    ]
    out(table(["candidate", "passes", "possible"], rows))
    out(f"target {prepared.target.name}, metric {prepared.metric.name}, budget {budget}, output {folder_name}")
    return whole


def _print_result(result: OptimizeResult, folder: Path) -> None:
    kind = "measured" if result.chosen.latency and result.chosen.latency.is_on_target else "host"
    metric = result.request.metric
    headers = ["candidate", metric, "drop", "95 % interval", f"p50 ms ({kind})", "ratio", "kB", "verdict", "reason"]
    rows = [_row(candidate) for candidate in result.candidates]
    out(table(headers, rows, right=[1, 2, 4, 5, 6]))
    out()
    out(paint(result.verdict, "bold", "green" if result.is_budget_met else "yellow"))
    default = " (the default: none was given)" if result.request.is_default_budget else ""
    out(f"budget: {result.request.budget}{default}")
    out(f"written to {folder}: {_model_name(result)}, candidate.json, report.html")
    note(f"{len(result.candidates)} candidates in {format_seconds(result.seconds)}", "dim")


def _model_name(result: OptimizeResult) -> str:
    return result.chosen.artifact.path if result.chosen.artifact else "no model"


def _row(candidate: Candidate) -> list[str]:
    """One line of the table; a failed candidate has its reason and no numbers."""
    report, latency, artifact = candidate.evaluation, candidate.latency, candidate.artifact
    is_share = report is not None and 0 <= report.value <= 1
    digits = 4 if is_share else 2
    value = f"{report.value:.{digits}f}" if report else "-"
    drop = f"{round(report.drop, digits) + 0.0:+.{digits}f}" if report else "-"
    interval = "-"
    if report is not None and report.drop_low is not None and report.drop_high is not None:
        interval = f"{report.drop_low:+.{digits}f} … {report.drop_high:+.{digits}f}"
    ratio = f"{latency.ratio:.2f}" if latency and latency.ratio is not None else "-"
    return [
        candidate.name,
        value,
        drop,
        interval,
        f"{latency.p50_ms:.3f}" if latency else "-",
        ratio,
        f"{artifact.size_bytes / 1000:.1f}" if artifact else "-",
        MARKS[candidate.verdict.status],
        candidate.verdict.reason.partition(": ")[0] if candidate.verdict.status == "chosen" else candidate.verdict.reason,
    ]
