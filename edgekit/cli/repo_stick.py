"""``edgekit repo stick``: a release for devices without a network."""

from __future__ import annotations

from pathlib import Path

import typer

from edgekit.cli.console import format_bytes, note, out


def stick(
    folder: Path = typer.Argument(..., metavar="DIR", help="The repository."),
    release: list[str] = typer.Argument(..., metavar="NAME[@VERSION]...", help="Releases; a name alone is the newest."),
    destination: Path = typer.Option(..., "--out", metavar="STICK", help="A folder of its own on the stick."),
    channel: str = typer.Option("production", "--channel", help="Of the releases."),
) -> None:
    """Write releases to a stick; edgekit agent install takes them from there, without a network."""
    from edgekit.repository.stick import make_stick

    made = make_stick(folder, destination, names=tuple(release), channel=channel)
    for each in made.releases:
        out(f"{each.info.name}@{each.info.version} (release {each.info.counter})")
    note(f"{destination}: {made.files} files, {format_bytes(made.size_bytes)}; on the device: edgekit agent install STICK")
