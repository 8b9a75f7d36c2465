"""``edgekit recalibrate``: from drift in the field to a better release, and a canary rollout of it.

Runs where the compiler and the publisher's key are, a workstation or CI: once, or with --watch as work orders come. The fleet
server cannot do it, since it holds no key.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import Progress, format_seconds, note, out, out_json, paint, table, warn
from edgekit.errors import EdgekitError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from edgekit.cli.recalibrate_report import Story
    from edgekit.cli.recalibrate_stages import Options, Run
    from edgekit.evaluation.rivals import Rivalry
    from edgekit.schema.recalibration import Answer
    from edgekit.schema.work import WorkOrder

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
ACCEPTED = ("better", "not-worse")


@app.command()
def recalibrate(
    name: str = typer.Argument(..., metavar="NAME", help="The model, as its releases are called."),
    model: str = typer.Option(
        ..., "--model", "-m", metavar="MODEL", help="What it is made of: .onnx, file.py:factory, a TrainTask."
    ),
    repository: Path = typer.Option(..., "--repository", metavar="DIR", help="The update repository."),
    data: str = typer.Option(..., "--data", "-d", help="The old calibration data."),
    evaluation: str = typer.Option(..., "--eval", help="The old evaluation data, labelled if possible: nothing may be lost."),
    target: list[str] = typer.Option(..., "--target", "-t", help="Target profiles; several make variants."),
    key: list[Path] = typer.Option([], "--key", help="The publisher's private key; several sign together."),
    fleet: str = typer.Option("", "--fleet", metavar="URL", help="The fleet server: orders, samples, rollout."),
    order: int = typer.Option(
        0, "--order", metavar="N", help="This work order.  [default: the oldest that waits, or a new one]"
    ),
    samples: Path | None = typer.Option(
        None, "--samples", metavar="NPZ", help="Field samples from a file instead; a label below 0 means none."
    ),
    train: str = typer.Option("", "--train", metavar="FUNCTION", help="Train first: file.py:function, see docs/loop.md."),
    weights: Path | None = typer.Option(None, "--weights", help="State dict of a torch model."),
    from_channel: str = typer.Option("production", "--from", metavar="CHANNEL", help="Whose newest release is to be beaten."),
    channel: str = typer.Option("staging", "--to", metavar="CHANNEL", help="Where the new one is published."),
    version: str = typer.Option("", "--version", help="Of the new release.  [default: the next one]"),
    share: float = typer.Option(0.5, "--share", min=0.01, max=1.0, help="Of the calibration data that is field samples."),
    since: str = typer.Option("14d", "--since", metavar="TIME", help="How far back samples are taken."),
    min_samples: int = typer.Option(200, "--min-samples", min=2, help="Distinct field samples that are needed."),
    min_labels: int = typer.Option(100, "--min-labels", min=0, help="Labelled ones for a verdict by labels."),
    max_samples: int = typer.Option(20_000, "--max-samples", min=2, help="At most so many are taken."),
    margin: float = typer.Option(0.02, "--margin", min=0.0, help="A loss of up to this counts as not worse."),
    accept: str = typer.Option("better", "--accept", help="What must be shown on field samples: better, or not-worse."),
    metric: str = typer.Option("", "--metric", help="What counts; default by task and labels."),
    budget: str = typer.Option("", "--budget", help="Of edgekit optimize."),
    effort: str = typer.Option("default", "--effort", help="fast, default or max."),
    seed: int = typer.Option(0, "--seed", help="Of everything that is drawn at random."),
    with_redacted: bool = typer.Option(False, "--with-redacted", help="Use samples that devices blurred or cut, too."),
    card: Path | None = typer.Option(None, "--card", help="As of bundle pack."),
    contract: Path | None = typer.Option(None, "--contract", help="As of bundle pack; default: the rules of what serves."),
    features: Path | None = typer.Option(None, "--features", help="As of bundle pack."),
    raw: Path | None = typer.Option(None, "--raw", help="As of bundle pack."),
    identity: str = typer.Option("", "--identity", metavar="FILE", help="The age identity that opens a sealed model."),
    waves: str = typer.Option("canary:1,10%,50%,100%", "--waves", help="Of the rollout."),
    soak: str = typer.Option("30min", "--soak", metavar="TIME", help="How long a wave must hold."),
    gates: list[str] = typer.Option(
        ["error_share<=2%", "latency_p95_ratio<=1.5"],
        "--gate",
        help="Of the rollout; repeatable. Open alerts are none by default: they are what this release is to end.",
    ),
    no_publish: bool = typer.Option(False, "--no-publish", help="Stop at the verdict."),
    no_rollout: bool = typer.Option(False, "--no-rollout", help="Publish, and begin no rollout."),
    output: Path | None = typer.Option(
        None, "--out", "-o", help="Job folder.  [default: edgekit-out/recalibrate-NAME or …-order-N]"
    ),
    watch: bool = typer.Option(False, "--watch", help="Stay, and carry out each order for NAME as it comes."),
    every: str = typer.Option("1min", "--every", metavar="TIME", help="How often --watch looks."),
    is_json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
    is_quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress on stderr."),
) -> int:
    """Recalibrate or retrain NAME with field samples; publish and roll out what is better than the model that serves.

    Field samples are checked, mixed with the old calibration data, and compiled as edgekit optimize does. Samples that nothing
    learned from decide, in pairs, against the release that serves: on the field, and on the old data, of which nothing may be
    lost. Only then a signed release is published on the staging channel, with a new drift baseline and its lineage, and a
    canary rollout begins. Every stage is kept: Ctrl-C, and the same command goes on. Exit 1: it is not better.
    """
    from edgekit.cli.agent_operation import parse_duration
    from edgekit.cli.recalibrate_stages import Options

    if accept not in ACCEPTED:
        raise UsageError("recalibrate.accept", f"--accept {accept}: not known.", hint="Choose better or not-worse.")
    if not fleet and samples is None:
        raise UsageError("recalibrate.no_source", "no field samples.", hint="Give --fleet URL, or --samples FILE.npz.")
    if (watch or order) and not fleet:
        raise UsageError("recalibrate.no_fleet", "--watch and --order need --fleet URL.")
    if train and not min_labels:
        raise UsageError(
            "recalibrate.labels",
            "--train with --min-labels 0: without labels nobody can tell whether training helped.",
            hint="Give --min-labels 100, or leave --train out.",
        )
    if not no_publish and not key:
        raise UsageError(
            "bundle.no_key", "no --key to sign the new release with.", hint="Give the publisher's key, or --no-publish."
        )
    options = Options(
        name=name,
        model=model,
        repository=repository,
        data=data,
        evaluation=evaluation,
        targets=tuple(target),
        out=output or Path("edgekit-out"),
        keys=tuple(key),
        fleet=fleet.rstrip("/"),
        samples=samples,
        train=train,
        weights=weights,
        from_channel=from_channel,
        channel=channel,
        version=version,
        share=share,
        min_samples=min_samples,
        min_labelled=min_labels,
        max_samples=max_samples,
        margin=margin,
        accept=("better", "not worse") if accept == "not-worse" else ("better",),
        metric=metric,
        budget=budget,
        effort=effort,
        seed=seed,
        with_redacted=with_redacted,
        card=card,
        contract=contract,
        features=features,
        raw=raw,
        waves=waves,
        soak_min=parse_duration(soak, "--soak") / 60,
        gates=tuple(gates),
        is_published=not no_publish,
        is_rolled_out=not no_rollout,
        identity=identity,
    )
    since_s = parse_duration(since, "--since")
    if watch:
        return _watch(options, since_s, every_s=parse_duration(every, "--every"), is_quiet=is_quiet)
    found = _pick(options, order) if fleet else None
    return _carry_out(options, found, since_s, folder=output, is_json=is_json, is_quiet=is_quiet)


# --- orders -----------------------------------------------------------------------------------------------------------------


def _pick(options: Options, number: int) -> WorkOrder:
    """The order to carry out: the named one, one that this machine has begun, the oldest that waits, or a new one."""
    from edgekit.cli import recalibrate_fleet as fleet

    if number:
        found = fleet.find_order(options.fleet, number)
        if found.model != options.name:
            raise UsageError("recalibrate.order", f"work order {number} is for {found.model}, not {options.name}.")
        return found
    mine = fleet.my_orders(options.fleet, options.name, fleet.worker_name(options.out))
    waiting = mine or fleet.open_orders(options.fleet, options.name)
    if waiting:
        return waiting[0]
    kind = "retrain" if options.train else "recalibrate"
    return fleet.make_order(options.fleet, kind=kind, model=options.name, reason="by hand: edgekit recalibrate")


def _watch(options: Options, since_s: float, *, every_s: float, is_quiet: bool) -> int:
    """Carry out orders as they come, until Ctrl-C; one that fails is tried again when the command is."""
    note(f"waiting for work orders for {options.name} at {options.fleet}; Ctrl-C ends it", "dim")
    failed: set[int] = set()
    while True:
        order = _next_order(options, failed)
        if order is None:
            time.sleep(every_s)
            continue
        try:
            _carry_out(options, order, since_s, folder=None, is_json=False, is_quiet=is_quiet)
        except EdgekitError as error:
            note(f"{paint('error:', 'red', 'bold', stream=sys.stderr)} order {order.id}: {error.message} {error.hint}".rstrip())
            failed.add(order.id)


def _next_order(options: Options, failed: set[int]) -> WorkOrder | None:
    """What waits, this machine's own first; None too while the server does not answer."""
    from edgekit.cli import recalibrate_fleet as fleet

    try:
        mine = fleet.my_orders(options.fleet, options.name, fleet.worker_name(options.out))
        waiting = [*mine, *fleet.open_orders(options.fleet, options.name)]
    except EnvironmentFault as error:
        note(f"{error.message} Trying again.", "yellow")
        return None
    return next((each for each in waiting if each.id not in failed), None)


def _carry_out(
    options: Options, order: WorkOrder | None, since_s: float, *, folder: Path | None, is_json: bool, is_quiet: bool
) -> int:
    """One job from its beginning, or from where it stands, to its end."""
    from edgekit.cli import recalibrate_fleet as fleet
    from edgekit.cli.recalibrate_job import Job
    from edgekit.cli.recalibrate_stages import Run, find_serving

    worker = fleet.worker_name(options.out)
    number = order.id if order is not None else 0
    place = folder or options.out / f"recalibrate-{options.name}{f'-order-{number}' if number else ''}"
    serving = find_serving(options)
    now_ms = time.time_ns() // 1_000_000
    job = Job.open(
        place, name=options.name, since_ms=now_ms - round(since_s * 1000), now_ms=now_ms, order=number, worker=worker
    )
    if order is not None:
        fleet.take_order(options.fleet, number, worker)
        note(f"order     {number}: {order.kind} {order.model}{f', {order.reason}' if order.reason else ''}")
        if order.kind == "retrain" and not options.train:
            warn("the order asks for training, and no --train was given: the model is quantized anew only")
    run = Run(
        options=options,
        serving=serving,
        job=job,
        progress=Progress(is_quiet=is_quiet or is_json),
        is_quiet=is_quiet,
        order_id=number,
    )
    try:
        with fleet.kept(options.fleet, number, worker) if number else nullcontext():
            story, rivals = _stages(run)
    except KeyboardInterrupt:
        run.progress.clear()
        note(f"interrupted: what is finished is kept in {place}; the same command goes on from there", "yellow")
        raise
    finally:
        run.progress.clear()
    is_yes = story.answer in options.accept
    if number:
        result = f"{story.answer}: {story.outcome or story.why}"
        fleet.finish_order(options.fleet, number, worker, is_done=is_yes, result=result)
    _show(run, story, rivals, is_json=is_json)
    return 0 if is_yes else 1


# --- stages -----------------------------------------------------------------------------------------------------------------


def _stages(run: Run) -> tuple[Story, tuple[Rivalry, ...]]:
    """Every stage in its order, and the report at the end, whatever the answer is."""
    from edgekit.cli import recalibrate_stages as stages
    from edgekit.cli.recalibrate_report import Story, write_report

    def tell(answer: Answer, why: str, outcome: str, rivals: tuple[Rivalry, ...] = (), release: str = "") -> Story:
        story = Story(
            title=f"Recalibration of {run.options.name}",
            answer=answer,
            why=why,
            outcome=outcome,
            serving=run.serving.what,
            release=release,
            checks=checks,
            shifts=shifts,
            rivals=rivals,
            stages=run.job.record.stages,
            notes=tuple(dict.fromkeys(run.notes)),
        )
        write_report(run.folder, story)
        return story

    stages.take_samples(run)
    checks, shifts = stages.check_samples(run)
    refused = [each for each in checks if each.verdict == "refused"]
    if refused:
        why = "; ".join(each.text for each in refused)
        return tell("refused", f"the field samples are not enough: {why}", "Nothing was made; run again when more came."), ()
    for step in (stages.prepare_data, stages.train_model, stages.compile_model):
        step(run)
    rivals = stages.evaluate_rivals(run)
    answer = stages.decide(rivals)
    why = _why(rivals)
    if answer not in run.options.accept:
        return tell(answer, why, f"Nothing was published: {run.serving.what} goes on serving.", rivals), rivals
    if not run.options.is_published:
        return tell(answer, why, "Not published (--no-publish).", rivals), rivals
    version = stages.choose_version(run)
    stages.publish(run, stages.pack(run, version, rivals), version)
    number = stages.roll_out(run, version)
    release = f"{run.options.name}@{version}"
    began = f"rollout {number} has begun" if number else f"begin its rollout by: {stages.rollout_command(run.options, version)}"
    return tell(answer, why, f"{release} is published on {run.options.channel}; {began}.", rivals, release), rivals


def _why(rivals: tuple[Rivalry, ...]) -> str:
    parts = [
        f"{each.metric} on {each.samples} {each.name}: {each.current:.4f} → {each.candidate:.4f}, {each.verdict}"
        + (f" ({each.reason})" if each.reason else "")
        for each in rivals
    ]
    return "; ".join(parts)


def _show(run: Run, story: Story, rivals: tuple[Rivalry, ...], *, is_json: bool) -> None:
    from edgekit.cli.recalibrate_report import HTML_FILE, interval

    if is_json:
        out_json(rivals)
        return
    if rivals:
        rows = [
            [
                each.name, each.metric, str(each.samples), f"{each.current:.4f}", f"{each.candidate:.4f}", f"{each.gain:+.4f}",
                interval(each), each.verdict,
            ]
            for each in rivals
        ]  # fmt: skip
        headers = ["data", "metric", "samples", "serves now", "new", "gain", "95 % interval", "verdict"]
        out(table(headers, rows, right=[2, 3, 4, 5]))
        out()
    is_yes = story.answer in run.options.accept
    out(f"{paint(story.answer, 'bold', 'green' if is_yes else 'yellow')}: {story.outcome if is_yes else story.why}")
    if not is_yes:
        out(story.outcome)
    out(f"report: {run.folder / HTML_FILE}")
    seconds = sum(each.seconds for each in run.job.record.stages)
    note(f"the stages took {format_seconds(seconds)}", "dim")
