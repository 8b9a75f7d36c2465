"""Post-training quantization by edgekit and by other tools, on the same models, with the same data.

    python scripts/bench/ptq --cache DIR                                  everything that DIR/models has
    python scripts/bench/ptq --cache DIR --models convnet --tools nncf,edgekit
    python scripts/bench/ptq --cache DIR --tools edgekit --fresh          run edgekit again; other results stay

DIR/models/NAME holds model.onnx, calibration.npz, evaluation.npz and about.json. Peers get environments of their own in DIR and
never edgekit's. Results lie in DIR/results; the tables and figures in DIR/results/summary.md and, as JSON, in --json's file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peers import TOOLS, make_environment
from runs import TIME_LIMIT_S, run_tool


def main(arguments: Sequence[str]) -> int:
    """Run the tools, then measure what they made."""
    parser = argparse.ArgumentParser(prog="ptq", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of models, environments and results")
    parser.add_argument("--models", help="names, separated by commas; default: all")
    parser.add_argument("--tools", help=f"of {', '.join(TOOLS)}; default: all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--fresh", action="store_true", help="run these tools again")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds for each run of a tool")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each model and thread count")
    options = parser.parse_args(arguments)
    cache = options.cache.resolve()
    models = _chosen(parser, options.models, sorted(path.parent.name for path in cache.glob("models/*/about.json")), "model")
    tools = _chosen(parser, options.tools, list(TOOLS), "tool")
    for tool in tools:
        _prepare(cache, tool)
        for model in models:
            run = run_tool(cache, model, TOOLS[tool], is_fresh=options.fresh, time_limit_s=options.time_limit)
            print(f"{model} {tool}: {run.failure or f'{run.cost.seconds:.1f} s'}", file=sys.stderr, flush=True)
    _report(cache, models, options.seconds, options.json)
    return 0


def _chosen(parser: argparse.ArgumentParser, text: str | None, known: Sequence[str], what: str) -> list[str]:
    """The names of a list; a wrong one ends the program with the right ones."""
    names = [name.strip() for name in text.split(",")] if text else list(known)
    if not names:
        parser.error(f"no {what}s; expected DIR/models/NAME/about.json")
    for name in names:
        if name not in known:
            parser.error(f"{name}: no such {what}; choose from {', '.join(known)}")
    return names


def _prepare(cache: Path, tool: str) -> None:
    """Make a tool's environment; where that fails, its runs fail with the reason."""
    family = TOOLS[tool].family
    try:
        make_environment(cache, family)
    except subprocess.CalledProcessError as error:
        print(f"{tool}: its environment cannot be made ({error}); see {cache}/venv-peers-{family}.log", file=sys.stderr)


def _report(cache: Path, models: Sequence[str], seconds: float, file: Path | None) -> None:
    # late: a tool's peak of memory begins at that of the process that starts it
    from measure import measure_model  # noqa: PLC0415
    from summary import markdown, plain, summarize  # noqa: PLC0415

    from edgekit.schema.base import encode_json  # noqa: PLC0415

    reports = []
    for model in models:
        print(f"measuring {model}", file=sys.stderr, flush=True)
        reports.append(measure_model(cache, model, list(TOOLS), seconds=seconds))
        target = cache / "results" / model / "measured.json"
        target.write_bytes(encode_json(reports[-1]))
    summary = summarize(reports)
    (cache / "results" / "summary.md").write_text(markdown(summary), encoding="utf-8")
    if file:
        file.write_bytes(encode_json(summary))
    print(plain(summary))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
