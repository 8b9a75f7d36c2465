"""The report of a run: ``report.html`` for people, ``report.json`` with the same facts for programs.

Both are written durably. The page is one self-contained file: it asks the network for nothing and runs no script.

    >>> write_report(Path("out"), result)   # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path

from edgekit.compiler.report_page import render_page
from edgekit.compiler.result import OptimizeResult
from edgekit.durable import write_durably
from edgekit.schema.base import encode_json

HTML_NAME = "report.html"
JSON_NAME = "report.json"


def write_report(out_dir: Path, result: OptimizeResult) -> None:
    """Write ``report.json`` and ``report.html`` into the output folder, which is made where missing.

    Raises:
        OSError: when the folder cannot be written.
    """
    write_durably(out_dir / JSON_NAME, encode_json(result))
    write_durably(out_dir / HTML_NAME, render_page(result).encode("utf-8"))
