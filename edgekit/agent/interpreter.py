"""How the agent starts modules of its own package in further processes."""

from __future__ import annotations

import sys
from pathlib import Path

import edgekit


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules.

    ``-m`` alone would put the working directory first on the import path, and a folder called ``edgekit`` there before the
    installed package; ``-P`` forbids that. In a checkout that is itself the working directory it is what is wanted.
    """
    is_checkout = Path(edgekit.__file__).resolve().parents[1] == Path.cwd()
    return [sys.executable, *([] if is_checkout else ["-P"]), "-m", module, *arguments]
