"""``edgekit fleet simulate``: many devices that are not there, and what became of their messages."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import format_bytes, format_seconds, note, out, out_json, table, warn
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.fleet.simulator.ledger import LedgerLine, Verdict
    from edgekit.fleet.simulator.population import Population
    from edgekit.fleet.simulator.releases import ReleaseBook
    from edgekit.fleet.simulator.simulation import Progress, Summary

LINE_S = 10.0


def simulate(
    devices: int = typer.Option(100, "--devices", "-n", min=0, help="How many; 0 only verifies the ledger of an earlier run."),
    broker: str = typer.Option("mqtt://127.0.0.1:1883", "--broker", help="mqtt(s)://[user:password@]host[:port]."),
    sites: int = typer.Option(5, "--sites", min=1, help="Among how many sites they are spread."),
    model: str = typer.Option("kws@2.0.0", "--model", help="The release that they run when it begins."),
    releases: list[str] = typer.Option(
        [],
        "--release",
        metavar="NAME@VERSION[#N]",
        help="Another one that they may be asked for; counters count up. Repeatable.",
    ),
    repository: str = typer.Option("", "--repository", metavar="URL", help="Take the releases from this update repository."),
    repository_root: str = typer.Option("", "--repository-root", metavar="FILE", help="Its metadata/1.root.json."),
    fleet_keys: list[Path] = typer.Option(
        [],
        "--fleet-key",
        metavar="PUB",
        help="Obey desired states that this key signed; without one they obey none. Repeatable.",
    ),
    faults: str = typer.Option(
        "",
        "--faults",
        help="Of a release: fail=5%,rollback=1%,silent=10%,dark=1%,regress=.4. Of devices: slow=2%,offline=1%,crashloop=1%,"
        "clock=1%,sensor=1%,full=1%. Of what they see: drift=.3@10min,concept=.2@10min/20%.",
    ),
    faulty: list[str] = typer.Option(
        [], "--faulty-release", metavar="NAME@VERSION", help="Only this one has the faults of releases. Repeatable."
    ),
    telemetry: str = typer.Option("30s", "--telemetry-every", help="Length of a window."),
    heartbeat: str = typer.Option("30s", "--heartbeat-every", help="Time between signs of life."),
    duration: str = typer.Option("", "--for", help="How long, in the devices' time.  [default: until Ctrl-C]"),
    speed: float = typer.Option(1.0, "--speed", help="Seconds of the devices' time that pass in one."),
    seed: int = typer.Option(0, "--seed", min=0, help="Chooses who has which fault; the same seed, the same fleet."),
    prefix: str = typer.Option("sim", "--prefix", help="Devices are called PREFIX-000000 and so on."),
    connect_rate: float = typer.Option(1000.0, "--connect-rate", help="Connections a second at the beginning."),
    requests: float = typer.Option(10.0, "--requests", min=0.0, help="Inferences a second of a device, on average."),
    self_test: str = typer.Option("5s", "--self-test", help="How long a middling device tests a new release."),
    probation: str = typer.Option("60s", "--probation", help="How long a new release has to prove itself."),
    baseline: str = typer.Option("", "--baseline", metavar="FILE", help="A reference profile (JSON) that inputs follow."),
    bundle: str = typer.Option("", "--bundle", metavar="FILE", help="The same, out of a bundle; it also names the release."),
    write_profile: str = typer.Option("", "--write-profile", metavar="FILE", help="Write the built-in profile there, and end."),
    processes: int = typer.Option(1, "--processes", min=1, max=64, help="Among how many processes they are shared."),
    ledger: str = typer.Option("", "--ledger", metavar="FILE", help="Write down what was sent, by number."),
    verify: str = typer.Option("", "--verify", metavar="DATABASE", help="Compare with what the fleet server stored."),
    ca_file: str = typer.Option("", "--ca", metavar="FILE", help="Certificates to trust for mqtts."),
    cert_file: str = typer.Option("", "--cert", metavar="FILE", help="One certificate for all of them."),
    key_file: str = typer.Option("", "--cert-key", metavar="FILE", help="Its key."),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="Accept a broker without TLS off loopback."),
    settle: str = typer.Option("60s", "--settle", help="How long --verify waits for what the server still writes."),
    json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Simulate a fleet: the real protocol, realistic telemetry, and faults that a seed chooses.

    Ends after --for or with Ctrl-C, and then says what was sent, acknowledged and lost. With --verify it ends with 1 unless the
    database has everything that was acknowledged, once.
    """
    from edgekit.fleet.config import parse_broker
    from edgekit.fleet.simulator.ledger import read_ledger, write_ledger
    from edgekit.fleet.simulator.options import SimulatorOptions, check_options, parse_duration, parse_faults
    from edgekit.fleet.simulator.running import Job, run
    from edgekit.trust.keys import load_public_key

    if write_profile:
        _write_profile(Path(write_profile))
        return
    if verify and not (ledger or devices):
        raise UsageError("config.invalid", "--verify without devices needs the --ledger of an earlier run.")
    options = SimulatorOptions(
        devices=devices,
        sites=sites,
        prefix=prefix,
        seed=seed,
        telemetry_s=parse_duration(telemetry, "--telemetry-every"),
        heartbeat_s=parse_duration(heartbeat, "--heartbeat-every"),
        duration_s=parse_duration(duration, "--for") if duration else 0.0,
        speed=speed,
        connects_per_s=connect_rate,
        requests_per_s=requests,
        self_test_s=parse_duration(self_test, "--self-test"),
        probation_s=parse_duration(probation, "--probation"),
        faults=parse_faults(faults),
        faulty=tuple(faulty),
    )
    check_options(options)
    address = parse_broker(broker, ca_file=ca_file, cert_file=cert_file, key_file=key_file, is_plain_allowed=allow_insecure)
    summary, lines = None, None
    if devices:
        keys = tuple(load_public_key(path) for path in fleet_keys)
        book = _open_book(model, releases, repository, repository_root, _open_population(baseline), bundle)
        _announce(options.devices, broker, book, has_keys=bool(keys))
        job = Job(options=options, book=book, address=address, keys=keys, with_ledger=bool(ledger or verify))
        outcome = run(job, processes=processes, tell=_LiveLine())
        summary, lines = outcome.summary, outcome.ledger
        if ledger:
            write_ledger(Path(ledger), lines)
        if sys.stderr.isatty():
            note()
    wait_s = parse_duration(settle, "--settle")
    verdict = _verify(verify, read_ledger(Path(ledger)) if lines is None else lines, wait_s) if verify else None
    _finish(summary, verdict, is_json=json)


def _announce(devices: int, broker: str, book: ReleaseBook, *, has_keys: bool) -> None:
    shown = broker.rpartition("@")[2] if "@" in broker else broker
    others = ", ".join(each.label for each in book.releases if each is not book.first)
    note(f"{devices} devices run {book.first.label} and report to {shown}{f'; they know {others}' if others else ''}.")
    if not has_keys:
        note("They obey no desired state: give the fleet's public key with --fleet-key.", "dim")
    note("Ctrl-C ends it cleanly.", "dim")


def _write_profile(path: Path) -> None:
    from edgekit.durable import write_durably
    from edgekit.fleet.simulator.population import Population, make_profile
    from edgekit.schema.base import encode_json

    write_durably(path, encode_json(make_profile()))
    note(f"{path}: the built-in reference profile; windows name it {Population().crc}.")


def _open_population(baseline: str) -> Population | None:
    """What devices see: by a file, or None for the built-in profile."""
    from edgekit.fleet.simulator.population import Population
    from edgekit.schema.base import decode_json
    from edgekit.schema.baseline import ReferenceProfile

    if baseline:
        try:
            data = Path(baseline).read_bytes()
        except OSError as error:
            raise UsageError("config.unreadable", f"--baseline {baseline}: {error.strerror}.") from error
        return Population(decode_json(data, ReferenceProfile, name=baseline), data=data)
    return None


def _open_book(
    model: str, releases: list[str], repository: str, root: str, population: Population | None, bundle: str
) -> ReleaseBook:
    from edgekit.fleet.simulator.releases import ReleaseBook, invent_release, read_bundle_release, read_catalog

    if bool(repository) != bool(root):
        raise UsageError("config.repository", "--repository and --repository-root go together.")
    if sum(map(bool, (population, bundle, repository))) > 1:
        raise UsageError("config.invalid", "--baseline, --bundle and --repository all say what devices see: give one of them.")
    if not repository:
        first = invent_release(model, counter=1)
        if bundle:
            first, population = read_bundle_release(Path(bundle), counter=1)
        others = [invent_release(text, counter=first.counter + number) for number, text in enumerate(releases, 1)]
        return ReleaseBook([first, *others], population=population)
    import tempfile
    from datetime import UTC, datetime

    from edgekit.fleet.catalog import Catalog

    with tempfile.TemporaryDirectory(prefix="edgekit-simulator-") as folder:
        catalog = Catalog(repository, root_file=Path(root), cache_dir=Path(folder))
        catalog.refresh(datetime.now(UTC))
        return read_catalog(catalog, model, population=population)


class _LiveLine:
    """How it stands: one rewritten line on a terminal, a line each ten seconds elsewhere."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, progress: Progress) -> None:
        text = (
            f"{format_seconds(progress.elapsed_s)}  connected {progress.connected:,} of {progress.devices:,}"
            f"  sent {progress.sent:,}  acknowledged {progress.acknowledged:,}  in flight {progress.in_flight:,}"
            f"  waiting {progress.waiting:,}  lost connections {progress.lost_connections:,}"
        )
        if progress.unheard:
            text += f"  unheard {progress.unheard:,}"
        if progress.behind_s > 1:
            text += f"  {progress.behind_s:.1f} s late: this machine is too slow"
        if progress.last_error and not progress.connected:
            text += f"  {progress.last_error}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text[:200]}\x1b[K")
            sys.stderr.flush()
        elif time.monotonic() - self._told_at >= LINE_S:
            self._told_at = time.monotonic()
            note(text)


def _finish(summary: Summary | None, verdict: Verdict | None, *, is_json: bool) -> None:
    if is_json:
        out_json({"summary": summary, "verdict": verdict})
    else:
        if summary is not None:
            out(table(["what", "figure"], _rows(summary), right=[1]))
        if verdict is not None:
            _say_verdict(verdict)
    if summary is not None and not summary.connects:
        warn(f"no device was ever connected: {summary.last_error or 'the broker did not answer'}")
    failed = (verdict is not None and not verdict.is_exact) or (summary is not None and not summary.connects)
    if failed:
        raise typer.Exit(1)


def _rows(summary: Summary) -> list[list[str]]:
    rows = [
        ["devices", f"{summary.devices:,}"],
        ["all connected after", format_seconds(summary.connect_s) if summary.connect_s else "never"],
        ["connections lost", f"{summary.lost_connections:,}"],
        ["messages sent", f"{summary.sent:,}"],
        ["acknowledged", f"{summary.acknowledged:,}"],
        ["sent again", f"{summary.resent:,}"],
        ["unacknowledged at the end", f"{summary.unacknowledged:,}"],
        ["kept by devices that are away", f"{summary.kept:,}"],
        ["windows acknowledged", f"{summary.windows:,}"],
        ["bytes sent", format_bytes(summary.sent_bytes)],
        ["processor time", format_seconds(summary.cpu_s)],
        ["largest memory", format_bytes(summary.max_rss_mb * 1e6)],
    ]
    stories = {
        "desired states heard": summary.desired,
        "releases installed": summary.installed,
        "committed": summary.committed,
        "refused": summary.refused,
        "rolled back": summary.rolled_back,
        "ignored": summary.ignored,
        "windows merged": summary.merged,
        "windows given up, told": summary.dropped,
        "nobody listened": summary.unheard,
        "refused by the broker": summary.rejected,
    }
    return [*rows, *([name, f"{number:,}"] for name, number in stories.items() if number)]


def _verify(database: str, lines: tuple[LedgerLine, ...], settle_s: float) -> Verdict:
    """Compare with the database, giving the server time to store what the broker still has."""
    from edgekit.fleet.simulator.ledger import verify_ledger
    from edgekit.fleet.store import Store

    if "://" not in database and not Path(database).is_file():
        raise UsageError("fleet.database", f"{database}: no such file.", hint="Give the --db of edgekit fleet serve.")
    store = Store(database)
    try:
        deadline, before = time.monotonic() + settle_s, -1
        while True:
            verdict = verify_ledger(store, lines)
            if verdict.is_exact or (time.monotonic() >= deadline and verdict.stored == before):
                return verdict
            before = verdict.stored
            note(f"stored {verdict.stored:,} of {verdict.sent:,}; the server may still be writing", "dim")
            time.sleep(2.0)
    finally:
        store.close()


def _say_verdict(verdict: Verdict) -> None:
    out()
    out(
        f"sent {verdict.sent:,}  stored {verdict.stored:,}  lost {verdict.lost:,}  doubled {verdict.doubled:,}"
        f"  of {verdict.devices:,} devices, {verdict.windows:,} windows, {verdict.requests_stored:,} requests"
    )
    if verdict.unsure:
        out(f"{verdict.unsure:,} more were sent without an acknowledgement, {verdict.unsure_stored:,} of them arrived")
    for line in verdict.examples:
        warn(line)
