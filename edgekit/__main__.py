"""``python -m edgekit``: the same as the ``edgekit`` command."""

from edgekit.cli.main import run

run()
