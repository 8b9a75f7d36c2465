"""``edgekit target``: the profiles of the hardware that models are compiled for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import note, out, out_json, paint, table

app = typer.Typer(
    help="Target profiles: list, show, check, probe this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _int8_in_words(profile: Any) -> str:
    rules = profile.int8
    short = {"int8": "s8", "uint8": "u8"}
    parts = [short[rules.activations] + short[rules.weights], "per channel" if rules.per_channel else "per tensor"]
    if rules.reduce_range:
        parts.append("7-bit weights")
    return ", ".join(parts)


def _format_ram(megabytes: float) -> str:
    if megabytes < 1:
        return f"{megabytes * 1000:.0f} kB"
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def to_toml(profile: Any) -> str:
    """The profile as TOML that ``edgekit target check`` accepts."""
    import json

    import msgspec

    def value(item: Any) -> str:
        if isinstance(item, str):
            return json.dumps(item, ensure_ascii=False)
        if isinstance(item, bool):
            return "true" if item else "false"
        if isinstance(item, list | tuple):
            return "[" + ", ".join(value(part) for part in item) + "]"
        return repr(item)

    fields = msgspec.to_builtins(profile)
    plain = [f"{key} = {value(item)}" for key, item in fields.items() if item is not None and not isinstance(item, dict)]
    tables = []
    for key, item in fields.items():
        lines = [f"{name} = {value(part)}" for name, part in item.items() if part is not None] if isinstance(item, dict) else []
        if lines:
            tables.append("\n".join([f"[{key}]", *lines]))
    return "\n\n".join(["\n".join(plain), *tables]) + "\n"


@app.command("list")
def list_profiles(json: bool = typer.Option(False, "--json", help="Print the profiles as JSON.")) -> None:
    """List the shipped profiles; the one that this machine matches is marked."""
    from edgekit.target.load import list_targets
    from edgekit.target.probe import is_host

    profiles = list_targets()
    if json:
        out_json(profiles)
        return
    rows = [
        [
            f"{profile.name} {'*' if is_host(profile) else ''}".rstrip(),
            profile.arch,
            profile.cpu,
            " ".join(profile.isa),
            str(profile.cores),
            _format_ram(profile.ram_mb),
            profile.runtime,
            _int8_in_words(profile),
        ]
        for profile in profiles
    ]
    out(table(["name", "arch", "cpu", "instruction set", "cores", "RAM", "runtime", "int8"], rows, right=[4, 5]))
    note("\n* this machine matches.  `--target host` probes this machine whatever it is.", "dim")


@app.command()
def show(
    name: str = typer.Argument(..., help="A shipped profile's name, a .toml file, or host."),
    json: bool = typer.Option(False, "--json", help="Print the profile as JSON."),
) -> None:
    """Show one profile with the source of each fact."""
    from edgekit.target.load import load_target, target_digest
    from edgekit.target.probe import is_host

    profile = load_target(name)
    if json:
        out_json(profile)
        return
    out(paint(profile.title, "bold"))
    facts = [
        ["processor", f"{profile.cpu} ({profile.arch})", profile.sources.get("cpu", "")],
        ["instruction set", " ".join(profile.isa), profile.sources.get("isa", "")],
        ["cores", f"{profile.cores}, benchmarks use {profile.threads}", profile.sources.get("cores", "")],
        ["RAM", _format_ram(profile.ram_mb), profile.sources.get("ram_mb", "")],
        ["flash", _format_ram(profile.flash_mb) if profile.flash_mb else "", profile.sources.get("flash_mb", "")],
        ["clock", f"{profile.clock_mhz:.0f} MHz" if profile.clock_mhz else "", profile.sources.get("clock_mhz", "")],
        ["runtime", profile.runtime, profile.sources.get("runtime", "")],
        ["int8", _int8_in_words(profile), profile.sources.get("int8", "")],
        ["channel multiple", str(profile.channel_multiple), profile.sources.get("channel_multiple", "")],
    ]
    out(table(["fact", "value", "source"], [row for row in facts if row[1]]))
    out(f"digest {target_digest(profile)}")
    if profile.notes:
        out(profile.notes)
    out("This machine matches." if is_host(profile) else "This machine is another: latencies measured here are the host's.")


@app.command()
def check(files: list[Path] = typer.Argument(..., help="Profile files.")) -> None:
    """Check profile files: types, unknown keys, sense."""
    from edgekit.errors import UsageError
    from edgekit.target.load import load_target

    for file in files:
        if file.suffix != ".toml":
            raise UsageError("target.not_toml", f"{file}: not a .toml file.", hint="Profiles are written in TOML.")
        profile = load_target(str(file))
        out(f"{file}: ok, {profile.title}")


@app.command()
def probe(
    name: str = typer.Option("this-machine", "--name", help="The profile's name."),
    file: Path | None = typer.Option(None, "--out", help="Write it to a file.  [default: stdout]"),
    json: bool = typer.Option(False, "--json", help="Print the profile as JSON."),
) -> None:
    """Write the profile of the machine that this runs on."""
    from edgekit.target.probe import probe_target

    profile = probe_target(name)
    if json:
        out_json(profile)
    elif file:
        file.write_text(to_toml(profile), encoding="utf-8")
        note(f"wrote {file}")
    else:
        out(to_toml(profile).rstrip())
