"""``python -m edgekit``: the same as the ``edgekit`` command."""

from edgekit.cli.entry import run

run()
