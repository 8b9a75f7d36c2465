"""``edgekit fleet command``, and what ``edgekit benchmark --device`` sends: signed orders to a device, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer

from edgekit.cli.console import note, out
from edgekit.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from edgekit.fleet.commanding import CommandResult
    from edgekit.schema.benchmark import BenchmarkRun
    from edgekit.schema.command import BenchmarkOrder, Command, CommandKind

BROKER = "mqtt://127.0.0.1:1883"
MIN_LIFE_S = 60.0


def split_device(device: str) -> tuple[str, str]:
    """Site and name of ``[SITE/]NAME``.

    >>> split_device("cam-7")
    ('default', 'cam-7')
    """
    site, _, name = device.rpartition("/")
    return site or "default", name


def make_command(
    device: str,
    kind: CommandKind,
    *,
    life_s: float,
    models: Sequence[str] = (),
    benchmark: BenchmarkOrder | None = None,
    pause_s: float | None = None,
) -> Command:
    """A new command, with the arguments of its kind.

    Raises:
        UsageError: ``command.arguments``.
    """
    from edgekit.schema.command import BenchmarkOrder, PauseOrder, RollbackOrder
    from edgekit.trust.command_signer import new_command

    if models and kind not in {"benchmark", "rollback"}:
        raise UsageError("command.arguments", f"{kind} takes no model.")
    if kind == "rollback" and len(models) > 1:
        raise UsageError("command.arguments", "rollback takes one model.")
    if pause_s is not None and kind != "pause":
        raise UsageError("command.arguments", f"--for says how long a pause lasts; {kind} has none.")
    return new_command(
        device,
        kind,
        now=datetime.now(UTC),
        life_s=life_s,
        benchmark=(benchmark or BenchmarkOrder(models=tuple(models))) if kind == "benchmark" else None,
        pause=PauseOrder(seconds=pause_s) if pause_s is not None else None,
        rollback=RollbackOrder(model=models[0]) if kind == "rollback" and models else None,
    )


def deliver(
    device: str,
    command: Command,
    *,
    keys: Sequence[Path],
    broker: str,
    ca_file: str,
    timeout_s: float,
    is_plain_allowed: bool,
    cert_file: str = "",
    key_file: str = "",
) -> CommandResult:
    """Sign a command, send it, wait for the answer; errors as :func:`edgekit.fleet.commanding.send_command`."""
    from edgekit.fleet.commanding import send_command
    from edgekit.fleet.config import parse_broker
    from edgekit.trust.command_signer import sign_command
    from edgekit.trust.signer import load_signer

    if not keys:
        raise UsageError(
            "command.unsigned", "no key to sign the command with.", hint="Give --key KEY; the device has its .pub."
        )
    address = parse_broker(broker, ca_file=ca_file, cert_file=cert_file, key_file=key_file, is_plain_allowed=is_plain_allowed)
    envelope = sign_command(command, [load_signer(key) for key in keys])
    site, _ = split_device(device)
    return send_command(address, command, envelope, site=site, timeout_s=timeout_s, on_progress=lambda text: note(text, "dim"))


def benchmark_on_device(
    device: str,
    order: BenchmarkOrder,
    *,
    keys: Sequence[Path],
    broker: str,
    ca_file: str,
    timeout_s: float,
    is_plain_allowed: bool,
) -> BenchmarkRun:
    """Let a device time models that lie on it; its record."""
    from edgekit.schema.base import decode_json
    from edgekit.schema.benchmark import BenchmarkRun

    _, name = split_device(device)
    command = make_command(name, "benchmark", life_s=max(MIN_LIFE_S, min(timeout_s, 86400.0)), benchmark=order)
    answer = deliver(
        device, command, keys=keys, broker=broker, ca_file=ca_file, timeout_s=timeout_s, is_plain_allowed=is_plain_allowed
    )
    return decode_json(answer.data, BenchmarkRun, name=f"the record of {device}")


def command(
    device: str = typer.Argument(..., metavar="[SITE/]DEVICE", help='As "edgekit fleet devices" shows it.'),
    kind: str = typer.Argument(..., help="benchmark, debug, pause, resume, probe or rollback."),
    models: list[str] = typer.Argument(
        None, metavar="[MODEL...]", help="Of benchmark: NAME or NAME@VERSION; of rollback: NAME."
    ),
    keys: list[Path] = typer.Option([], "--key", metavar="KEY", help="Signs the command; repeat where the device wants more."),
    broker: str = typer.Option(BROKER, "--broker", metavar="URL", help="mqtts://[user:password@]host[:port]."),
    ca_file: str = typer.Option("", "--ca", help="Certificates to trust for mqtts.", show_default="the system's"),
    cert_file: str = typer.Option("", "--cert", metavar="FILE", help="The certificate to log in with."),
    key_file: str = typer.Option("", "--cert-key", metavar="FILE", help="Its key."),
    pause_for: str | None = typer.Option(None, "--for", metavar="TIME", help="Of pause: 30min, 8h, 2d.", show_default="1d"),
    file: Path | None = typer.Option(None, "--out", metavar="FILE", help="Keep the result; debug needs it."),
    timeout_s: float = typer.Option(180.0, "--timeout", min=1, metavar="SECONDS", help="How long to wait for the answer."),
    expires_s: float = typer.Option(600.0, "--expires-s", min=1, max=86400, help="From then on the device refuses it."),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="Accept a broker without TLS off loopback."),
) -> None:
    """Let a device do something, once: signed, audited there, and answered.

    benchmark times models that lie on it, debug collects what shows what is wrong, pause and resume hold its updates, probe
    describes its hardware, rollback goes back to the other slot. A device obeys only the kinds of its setting commands, signed
    by a key of command_keys.
    """
    from edgekit.cli.agent_operation import parse_duration
    from edgekit.durable import write_durably
    from edgekit.schema.command import CommandKind

    if kind not in (known := get_args(CommandKind)):
        raise UsageError("command.kind", f"{kind}: no such command.", hint=f"Choose from {', '.join(known)}.")
    if kind == "debug" and file is None:
        raise UsageError("command.arguments", "a debug bundle is a file.", hint="Give --out debug.tar.gz.")
    pause_s = None if pause_for is None else parse_duration(pause_for, "--for")
    _, name = split_device(device)
    order = make_command(name, kind, life_s=expires_s, models=models or (), pause_s=pause_s)  # type: ignore[arg-type]
    answer = deliver(
        device,
        order,
        keys=keys,
        broker=broker,
        ca_file=ca_file,
        timeout_s=timeout_s,
        is_plain_allowed=allow_insecure,
        cert_file=cert_file,
        key_file=key_file,
    )
    if file is not None:
        try:
            write_durably(file, answer.data, mode=0o600)
        except OSError as error:
            raise EnvironmentFault("output.unwritable", f"{file}: cannot be written: {error.strerror}.") from error
        note(f"wrote {file}, {len(answer.data)} bytes")
    elif answer.data:
        out(answer.data.decode(errors="replace").rstrip())
    else:
        out(answer.text)
