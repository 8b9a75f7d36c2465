"""Where the program begins: with typer where it is installed, and with what stands in for it on a device."""

from __future__ import annotations

from importlib.util import find_spec


def run() -> None:
    """Console-script entry point."""
    if find_spec("typer") is None:
        from edgekit.cli.small_typer import stand_in

        stand_in()
    from edgekit.cli.main import run as run_main

    run_main()
