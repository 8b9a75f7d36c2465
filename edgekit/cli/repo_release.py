"""``edgekit repo``: what happens to a release after it was published: promote, roll back, recall, trace, prune, MLflow."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer

from edgekit.cli.console import Progress, format_bytes, note, out, out_json, paint, table, warn
from edgekit.cli.moment import parse_moment
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.repository.audit import AuditEntry
    from edgekit.repository.changes import Waiting
    from edgekit.repository.measuring import Trial
    from edgekit.repository.promotion import PromotionReport
    from edgekit.repository.prune import PruneReport
    from edgekit.schema.release import Fallback, Release

FOLDER = typer.Argument(..., metavar="DIR", help="The repository.")
RELEASE = typer.Argument(..., metavar="NAME@VERSION", help="The release.")
JSON = typer.Option(False, "--json", help="Print the record as JSON.")
ROLE_KEYS = typer.Option([], "--role-key", metavar="KEY", help="Sign the metadata with this private key, too: .pem or URI.")
FLEET = typer.Option("", "--fleet", metavar="URL", help="Ask this fleet server which devices have it (EDGEKIT_FLEET_TOKEN).")
MLFLOW = typer.Option(..., "--mlflow", metavar="URI", help="Tracking server or store, for example sqlite:///mlflow.db.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(promote)
    app.command()(gates)
    app.command()(rollback)
    app.command()(recall)
    app.command()(lineage)
    app.command()(audit)
    app.command()(prune)
    app.command("export")(export_release)
    app.command("import")(import_model)


# --- shared -----------------------------------------------------------------------------------------------------------------


def split_release(text: str) -> tuple[str, str]:
    """Name and version of ``NAME@VERSION``.

    Raises:
        UsageError: ``release.name``.
    """
    name, _, version = text.partition("@")
    if not name or not version:
        raise UsageError("release.name", f"{text}: not a release.", hint="Write NAME@VERSION, for example kws@1.2.0.")
    return name, version


def parse_fallback(text: str) -> Fallback:
    """What devices do with a model that may not serve any longer.

    Raises:
        UsageError: ``release.fallback``.
    """
    from edgekit.schema.release import Fallback

    for known in get_args(Fallback):
        if text == known:
            found: Fallback = known
            return found
    raise UsageError("release.fallback", f"--fallback {text}: not known.", hint="Choose previous, abstain or report.")


def exit_waiting(folder: Path, waiting: tuple[Waiting, ...]) -> None:
    """Say whose signatures are missing, on stderr's side of things where stdout is JSON. Exit 1."""
    from edgekit.cli.trust import print_waiting

    print_waiting(folder, waiting)
    raise typer.Exit(1)


def announce(folder: Path, release: Release, *, json: bool) -> None:
    """Say what became of a release. Exit 1: it still waits for signatures."""
    from edgekit.repository.ceremony import repository_status

    status = repository_status(folder)
    is_visible = release in status.releases
    info = release.info
    if json:
        out_json(release)
    else:
        word = "is" if is_visible else "will be"
        out(f"{info.name}@{info.version} {word} release {info.counter} on {info.channel}, {format_bytes(info.installed_bytes)}")
    if is_visible:
        return
    if json:
        for item in status.waiting:
            note(f"{item.role} version {item.version} is not published yet: {item.reason}")
        raise typer.Exit(1)
    exit_waiting(folder, status.waiting)


# --- promote ----------------------------------------------------------------------------------------------------------------


def promote(
    folder: Path = FOLDER,
    release: str = RELEASE,
    to: str = typer.Option(..., "--to", metavar="CHANNEL", help="The next channel: staging, then production."),
    data: str = typer.Option("", "--data", metavar="DATA", help="Samples to compare with the channel's release on."),
    metric: str = typer.Option("", "--metric", help="What counts; default by task and labels."),
    limit: int | None = typer.Option(None, "--limit", min=1, help="Use at most this many samples."),
    gate: str = typer.Option(
        "", "--gate", metavar="LIMITS", help='For this once: "drop<=0.01, latency_ratio<=1.1, hours>=24".'
    ),
    skip_gate: list[str] = typer.Option([], "--skip-gate", metavar="GATE", help="Leave this gate out; needs --reason."),
    reason: str = typer.Option("", "--reason", help="For the audit log."),
    seconds: float = typer.Option(2.0, "--seconds", min=0.01, help="Timing, for each model."),
    identity: str = typer.Option("", "--identity", metavar="FILE", help="The age identity that opens sealed models."),
    no_delta: bool = typer.Option(False, "--no-delta", help="Make no deltas from the channel's newest releases."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Measure only."),
    role_key: list[str] = ROLE_KEYS,
    json: bool = JSON,
) -> None:
    """Measure a release against the gates, here, and put it on the next channel. Exit 1: a gate says no, or it waits."""
    from edgekit.repository.deltas import make_deltas
    from edgekit.repository.gates import parse_gates
    from edgekit.repository.promotion import promote as promote_release
    from edgekit.repository.store import Store

    name, version = split_release(release)
    limits = parse_gates(gate, Store.open(folder).config.gates)
    progress = Progress(is_quiet=json)
    try:
        report = promote_release(
            folder,
            name,
            version,
            to=to,
            trial=make_trial(data, metric, limit, seconds=seconds, identity=identity, progress=progress),
            gates=limits,
            skip=skip_gate,
            reason=reason,
            is_dry_run=dry_run,
            delta_maker=None if no_delta else make_deltas,
            role_keys=role_key,
        )
    finally:
        progress.clear()
    if json:
        out_json(report)
    else:
        _show_promotion(report)
    if not report.is_passed:
        raise typer.Exit(1)
    if report.waiting:
        if json:
            raise typer.Exit(1)
        exit_waiting(folder, report.waiting)


def make_trial(data: str, metric: str, limit: int | None, *, seconds: float, identity: str, progress: Progress) -> Trial:
    """How a promotion is measured on this machine."""
    from edgekit.agent.facts import probe_facts
    from edgekit.agent.plan import choose_variant
    from edgekit.repository.measuring import Trial

    facts = probe_facts()
    return Trial(
        choose=lambda manifest: choose_variant(manifest, facts),
        data=data or None,
        metric=metric or None,
        limit=limit,
        seconds=seconds,
        identity=identity,
        on_progress=progress.update,
    )


def _show_promotion(report: PromotionReport) -> None:
    against = f"against {report.against}" if report.against else "the first release there"
    out(f"{report.name}@{report.version}: {report.source} → {report.channel}, {against}")
    if report.variant:
        beside = f" beside {report.against_variant}" if report.against_variant else ""
        out(f"measured on this machine: variant {report.variant}{beside}")
    rows = [[each.gate, each.value, each.limit, each.verdict, each.reason] for each in report.gates]
    out(table(["gate", "value", "limit", "verdict", "why"], rows))
    if not report.is_passed:
        out(paint("not promoted; nothing was changed", "red"))
    elif report.is_dry_run:
        out("a dry run: it would be promoted")
    else:
        word = "will be" if report.waiting else "is"
        out(f"{report.name}@{report.version} {word} release {report.counter} on {report.channel}")


def gates(
    folder: Path = FOLDER,
    limits: str = typer.Argument("", metavar="[LIMITS]", help='New ones, for example "drop<=0.02, publishers>=2".'),
    is_gated: bool | None = typer.Option(
        None, "--gated/--not-gated", help="Whether releases enter on the first channel only and are promoted from there."
    ),
    json: bool = JSON,
) -> None:
    """Show or change what a release must show before it is promoted."""
    from edgekit.repository.gates import describe_gates, parse_gates
    from edgekit.repository.promotion import set_gates
    from edgekit.repository.store import Store

    config = Store.open(folder).config
    wanted = parse_gates(limits, config.gates)
    if limits or is_gated is not None:
        set_gates(folder, wanted, is_gated=is_gated)
        config = Store.open(folder).config
    if json:
        out_json(config.gates)
        return
    out(f"{' → '.join(config.channels)}: {describe_gates(config.gates)}")
    if not config.is_gated:
        note("releases may also be published to any channel directly; --gated ends that")


# --- back and off -----------------------------------------------------------------------------------------------------------


def rollback(
    folder: Path = FOLDER,
    name: str = typer.Argument(..., metavar="NAME", help="The model."),
    to: str = typer.Option("", "--to", metavar="VERSION", help="Default: what the channel's newest release replaced."),
    channel: str = typer.Option("production", "--channel", help="Whose devices go back."),
    reason: str = typer.Option(..., "--reason", help="For the audit log and the release's notes."),
    role_key: list[str] = ROLE_KEYS,
    json: bool = JSON,
) -> None:
    """Publish an earlier release of a channel again, as the newest. Exit 1: it still waits for signatures."""
    from edgekit.repository.publishing import rollback as roll_back

    announce(folder, roll_back(folder, name, to=to, channel=channel, reason=reason, role_keys=role_key), json=json)


def recall(
    folder: Path = FOLDER,
    what: str = typer.Argument(..., metavar="DIGEST|NAME@VERSION", help="A model file or a release."),
    deadline: str = typer.Option(
        "", "--deadline", metavar="DATE", help="From then on no device serves it: a date, or +7d; UTC."
    ),
    reason: str = typer.Option(..., "--reason", help="For people."),
    fallback: str = typer.Option("previous", "--fallback", help="What devices that serve it do: previous, abstain or report."),
    is_lifted: bool = typer.Option(False, "--lift", help="Take it off the list."),
    role_key: list[str] = ROLE_KEYS,
) -> None:
    """Put a model or a release on the signed deny-list: none installs it from now on. Exit 1: it waits for signatures."""
    from edgekit.repository.publishing import recall as recall_digest

    now = datetime.now(UTC)
    if not deadline and not is_lifted:
        raise UsageError("recall.deadline", "a recall without --deadline.", hint="For example --deadline +7d, or +0h for now.")
    end = parse_moment(deadline, flag="--deadline", now=now) if deadline else now
    done = recall_digest(
        folder, what, deadline=end, reason=reason, fallback=parse_fallback(fallback), is_lifted=is_lifted, role_keys=role_key
    )
    word = "the recall is lifted" if is_lifted else f"recalled; no device serves it from {end:%Y-%m-%d %H:%M} UTC on"
    out(f"{what}: {word}")
    if any(item.role == "targets" for item in done.waiting):
        exit_waiting(folder, done.waiting)


# --- looking ----------------------------------------------------------------------------------------------------------------


def lineage(folder: Path = FOLDER, release: str = RELEASE, fleet: str = FLEET, json: bool = JSON) -> None:
    """Show where a release comes from, who did what with it, and which devices run it."""
    from edgekit.cli.fleet_uses import uses_of
    from edgekit.cli.lineage_tree import draw, tree_of
    from edgekit.repository.lineage import trace

    name, version = split_release(release)
    uses = uses_of(fleet, name, version) if fleet else None
    found = trace(folder, name, version, uses=uses)
    if json:
        out_json(found)
        return
    for line in draw(tree_of(found)):
        out(line)


def audit(
    folder: Path = FOLDER,
    verify: bool = typer.Option(False, "--verify", help="Also compare with what the signed snapshot says of the log."),
    accept_loss: str = typer.Option(
        "", "--accept-loss", metavar="REASON", help="Go on from a log that lost its end; the loss becomes an entry."
    ),
    json: bool = JSON,
) -> None:
    """Show who did what to the repository. Exit 4: the log was changed or cut."""
    from edgekit.repository.audit import SNAPSHOT_FIELD, check_anchor, read_log
    from edgekit.repository.ceremony import accept_cut_log
    from edgekit.repository.store import Store

    if accept_loss:
        accept_cut_log(folder, accept_loss)
    store = Store.open(folder)
    entries = read_log(folder)
    anchored = 0
    if verify:
        field = store.chain().snapshot.unrecognized_fields.get(SNAPSHOT_FIELD)
        check_anchor(entries, field)
        anchored = int(field.get("seq", 0)) if isinstance(field, dict) else 0
    if json:
        out_json(entries)
        return
    rows = [
        [str(each.seq), f"{each.at:%Y-%m-%d %H:%M}", each.actor, each.action, each.subject, _words(each)] for each in entries
    ]
    out(table(["entry", "time (UTC)", "who", "what", "of", "details"], rows, right=[0]))
    if verify:
        later = len(entries) - anchored
        out(f"{len(entries)} entries; each continues the one before; the signed snapshot binds the first {anchored}")
        if later:
            note(f"{later} later entries are bound by the next publication")


def _words(entry: AuditEntry) -> str:
    return ", ".join(f"{key}={value}" for key, value in entry.details.items() if value)


# --- pruning ----------------------------------------------------------------------------------------------------------------


def prune(
    folder: Path = FOLDER,
    keep: int = typer.Option(3, "--keep", min=1, help="The newest releases of each model and channel that stay."),
    keep_days: float = typer.Option(90.0, "--keep-days", min=0, help="Younger releases stay."),
    fleet: str = FLEET,
    dry_run: bool = typer.Option(False, "--dry-run", help="Say it only."),
    role_key: list[str] = ROLE_KEYS,
    json: bool = JSON,
) -> None:
    """Remove old releases that nobody needs, and the files that nothing names. Exit 1: the removal waits for signatures."""
    from edgekit.cli.fleet_uses import slots_in_use
    from edgekit.repository.prune import Policy
    from edgekit.repository.prune import prune as prune_repository

    in_use = frozenset((use.model, use.version) for use in slots_in_use(fleet)) if fleet else frozenset()
    policy = Policy(keep=keep, keep_days=keep_days, in_use=in_use)
    report = prune_repository(folder, policy, is_dry_run=dry_run, role_keys=role_key)
    if json:
        out_json(report)
        raise typer.Exit(1 if report.waiting else 0)
    _show_prune(report)
    if not fleet and report.removed:
        warn("no fleet server was asked: a device that runs a removed release could not fetch it again; see --fleet")
    if report.waiting:
        exit_waiting(folder, report.waiting)


def _show_prune(report: PruneReport) -> None:
    verb = "goes" if not report.waiting else "waits"
    rows = [
        *([each.release, each.channel, str(each.counter), "stays", each.reason] for each in report.kept),
        *(
            [f"{each.info.name}@{each.info.version}", each.info.channel, str(each.info.counter), verb, ""]
            for each in report.removed
        ),
    ]
    out(table(["release", "channel", "counter", "", "why"], rows, right=[2]))
    for file in report.files:
        out(f"{'would delete' if report.is_dry_run else 'deleted'} {file.path}  {format_bytes(file.size_bytes)}")
    out(f"{len(report.removed)} releases, {len(report.files)} files, {format_bytes(report.size_bytes)}")


# --- MLflow -----------------------------------------------------------------------------------------------------------------


def export_release(
    folder: Path = FOLDER,
    release: str = RELEASE,
    mlflow: str = MLFLOW,
    model: str = typer.Option("", "--model", metavar="NAME", help="The registered model's name; default: the model's own."),
    json: bool = JSON,
) -> None:
    """Register a release in an MLflow model registry, with its files, figures and channels."""
    from edgekit.repository.mlflow import export_release as export

    name, version = split_release(release)
    done = export(folder, name, version, uri=mlflow, model=model)
    if json:
        out_json(done)
        return
    word = "registered" if done.is_new else "was registered before; tags and aliases are up to date"
    out(f"models:/{done.model}/{done.model_version}  {word}; aliases: {', '.join(done.aliases) or 'none'}")


def import_model(
    model: str = typer.Argument(..., metavar="MODELS_URI", help="models:/NAME/VERSION or models:/NAME@ALIAS."),
    mlflow: str = MLFLOW,
    destination: Path = typer.Option(..., "--out", metavar="DIR", help="Folder for the model; new or empty."),
    file: str = typer.Option("", "--file", help="Which .onnx, where there are several."),
    json: bool = JSON,
) -> None:
    """Fetch a model from an MLflow model registry, to be optimized."""
    from edgekit.repository.mlflow import ORIGIN_FILE
    from edgekit.repository.mlflow import import_model as fetch

    origin = fetch(model, destination, uri=mlflow, file=file)
    if json:
        out_json(origin)
        return
    out(f"{destination / origin.file}  {format_bytes(origin.size_bytes)}  {origin.digest}")
    note(f"where it came from is in {destination / ORIGIN_FILE}; next: edgekit optimize {destination / origin.file}")
