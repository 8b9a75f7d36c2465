"""``edgekit inspect``: what a model consists of, and what the runtime makes of it on this host."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import Progress, format_bytes, note, out, out_json, paint, table
from edgekit.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from edgekit.compiler.findings import AuditFinding, Kernel, RuntimeAudit
    from edgekit.compiler.graph import GraphFacts
    from edgekit.runtime.session import Array

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
WIDEST = 110
"""Columns of running text."""
TIED = "\0"
"""Stands for the space between a number and its unit, where no line may end."""
MOST = 12
"""Findings shown of those that have the same repair."""
MEANINGS = {
    "float-island": "quantized in the file, run in float32",
    "unfused-pair": "converted and converted back",
    "conversion": "conversions that cost",
    "unknown-operator": "no operator of ONNX Runtime",
}


@app.command()
def inspect(
    model: Path = typer.Argument(help="An .onnx file."),
    data: str | None = typer.Option(None, "--data", "-d", show_default="random values", help="Data for the request."),
    threads: int = typer.Option(1, "--threads", min=1, help="Intra-op threads."),
    has_nodes: bool = typer.Option(False, "--nodes", help="List every node that ran."),
    is_strict: bool = typer.Option(False, "--strict", help="Exit 1 when anything is found."),
    repaired: Path | None = typer.Option(
        None, "--repaired", help="Write a model with what can be mended, .onnx.", show_default=False
    ),
    is_json: bool = typer.Option(False, "--json", help="Print the audit as JSON."),
) -> int:
    """Show what ONNX Runtime really runs for MODEL on this host, after its own optimization, and what it costs.

    Findings: layers that the file quantizes and that run in float32 all the same, and why; conversions back and forth;
    conversions that take more than 3 % of the time; operators that ONNX Runtime does not have. Each with its repair; those that
    need no new data are made with --repaired.

    The times are those of ONNX Runtime's profiler, which adds one or two microseconds to each node: what share a part has, not
    how fast the model is. For that use "edgekit benchmark".
    """
    from edgekit.compiler.audit import audit_runtime
    from edgekit.compiler.graph import facts_of, read_onnx

    if model.suffix == ".tflite":
        raise UsageError(
            "inspect.format",
            f"{model}: only ONNX models can be inspected; LiteRT does not tell what it runs.",
            hint=f'Time it with "edgekit benchmark {model}".',
        )
    facts = facts_of(read_onnx(model))
    feeds = _take_request(model, data, threads)
    progress = Progress(is_quiet=is_json or not sys.stderr.isatty())
    progress.update("timing each node")
    audit = audit_runtime(model, feeds, threads=threads)
    progress.clear()
    if is_json:
        out_json(audit)
    else:
        _print_facts(model, facts)
        _print_kernels(audit)
        if has_nodes:
            _print_nodes(audit)
        _print_findings(audit)
    if repaired is not None:
        _write_repaired(model, audit, repaired)
    if is_strict and audit.findings:
        note(f"--strict: {_count(len(audit.findings), 'finding')}", "red")
        return 1
    return ArtifactError.exit_code if audit.total_ms is None else 0


def _write_repaired(model: Path, audit: RuntimeAudit, path: Path) -> None:
    from edgekit.compiler.graph import read_onnx
    from edgekit.compiler.repair import repair_fully
    from edgekit.durable import write_durably

    if path.suffix != ".onnx" or path.resolve() == model.resolve():
        raise UsageError(
            "inspect.repaired", f"--repaired {path}: name another file that ends in .onnx.", hint="The model stays as it is."
        )
    proto, done = repair_fully(read_onnx(model), audit)
    if not done:
        note("nothing was found that can be mended in the file: nothing written")
        return
    write_durably(path, proto.SerializeToString())
    note(f"wrote {path}: {'; '.join(done)}", "green")
    note(f"compare them: edgekit benchmark {model} {path}")


def _take_request(model: Path, data: str | None, threads: int) -> dict[str, Array] | None:
    """The first samples of the data; None for random values."""
    from edgekit.benchmark.request import take_samples
    from edgekit.dataset.load import load_dataset
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    if data is None:
        return None
    session = open_session(model, options=SessionOptions(threads=threads))
    inputs = session.inputs
    session.close()
    return dict(take_samples(load_dataset(data, inputs).inputs, inputs))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _fill(text: str, *, indent: str = "", first: str | None = None) -> str:
    columns = shutil.get_terminal_size((WIDEST, 24)).columns if sys.stdout.isatty() else WIDEST
    begin = indent if first is None else first
    filled = textwrap.fill(
        re.sub(r"(\d) (?=\S)", rf"\1{TIED}", text),
        min(columns, WIDEST),
        initial_indent=begin,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(TIED, " ")


def _print_facts(model: Path, facts: GraphFacts) -> None:
    kind = "quantized" if facts.is_quantized else "float16" if facts.has_float16_weights else "float32"
    size = format_bytes(model.stat().st_size)
    out(_fill(f"{model.name}: {size}, {facts.parameters:,} parameters, {kind}, operator set {facts.opset}"))
    if facts.subgraph_share:
        out(
            _fill(f"{facts.subgraph_share:.0%} of the parameters lie inside If, Loop or Scan: what runs in there is not listed")
        )
    operators = ", ".join(f"{count} {name}" for name, count in Counter(facts.operators).most_common())
    label = "in the file: "
    out(_fill(operators, first=label, indent=" " * len(label)))
    out()


def _print_kernels(audit: RuntimeAudit) -> None:
    if audit.total_ms is None:
        note("ONNX Runtime refuses this model: an operator is unknown to it", "red")
        out()
        return
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in audit.kernels:
        groups.setdefault((kernel.op_type, kernel.precision), []).append(kernel)
    total = audit.total_ms or 0.0
    rows = [
        [name, precision, str(len(kernels)), f"{_ms(kernels):.3f}", _share(_ms(kernels), total)]
        for (name, precision), kernels in sorted(groups.items(), key=lambda item: -_ms(item[1]))
    ]
    rows.append(["all", "", str(len(audit.kernels)), f"{total:.3f}", ""])
    out(table(["what runs", "precision", "nodes", "ms", "share"], rows, right=[2, 3, 4]))
    spent = {kernel.precision: 0.0 for kernel in audit.kernels}
    for kernel in audit.kernels:
        spent[kernel.precision] += kernel.ms or 0.0
    parts = [f"{name} {_share(ms, total)}" for name, ms in sorted(spent.items(), key=lambda item: -item[1])]
    out()
    out(_fill("time by precision: " + ", ".join(parts)))
    out()


def _ms(kernels: list[Kernel]) -> float:
    return sum(kernel.ms or 0.0 for kernel in kernels)


def _share(ms: float, total: float) -> str:
    return f"{ms / total:.1%}" if total else ""


def _print_nodes(audit: RuntimeAudit) -> None:
    rows = [
        ["" if kernel.ms is None else f"{kernel.ms:.4f}", kernel.precision, kernel.op_type, kernel.node]
        for kernel in audit.kernels
    ]
    out(table(["ms", "precision", "operator", "node, in the order it runs"], rows, right=[0]))
    out()


def _print_findings(audit: RuntimeAudit) -> None:
    """The findings, those with one repair together."""
    if not audit.findings:
        out(paint("nothing found: nothing that was quantized runs in float32, conversions cost little", "green"))
        return
    groups: dict[tuple[str, str], list[AuditFinding]] = {}
    for finding in audit.findings:
        groups.setdefault((finding.kind, finding.repair), []).append(finding)
    for (kind, cure), findings in groups.items():
        times = [finding.ms for finding in findings if finding.ms is not None]
        cost = f": {sum(times):.3f} ms, {_share(sum(times), audit.total_ms or 0.0)}" if times else ""
        label = f"{kind} x {len(findings)}" if len(findings) > 1 else kind
        head = _fill(f"{label}  {MEANINGS[kind]}{cost}", indent="  ", first="")
        out(head.replace(label, paint(label, "yellow", "bold"), 1))
        ordered = sorted(findings, key=lambda finding: -(finding.ms or 0.0))
        for finding in ordered[:MOST]:
            each = f"  {finding.ms:6.3f} ms  " if finding.ms is not None else "  - "
            out(_fill(finding.text, first=each, indent=" " * len(each)))
        if ordered[MOST:]:
            out(f"  and {len(ordered) - MOST} more; --json has all")
        out(_fill(cure, first="  repair: ", indent="          "))
        out()
