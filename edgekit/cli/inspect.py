"""``edgekit inspect``: what a model consists of, and what the runtime makes of it on this host."""

from __future__ import annotations

from pathlib import Path

import typer

from edgekit.cli.console import format_bytes, note, out, out_json, paint, table
from edgekit.errors import UsageError

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def inspect(
    model: Path = typer.Argument(help="An .onnx file."),
    data: str | None = typer.Option(None, "--data", "-d", help="A real request (its first sample); default: random values."),
    threads: int = typer.Option(1, min=1, help="Threads of the session."),
    is_strict: bool = typer.Option(False, "--strict", help="Exit 1 when anything is found."),
    has_nodes: bool = typer.Option(False, "--nodes", help="List every node that ran."),
    is_json: bool = typer.Option(False, "--json", help="Print the audit as JSON."),
) -> int:
    """Show what ONNX Runtime really runs for MODEL on this host, after its own optimization, and what it costs.

    Findings: layers that the file quantizes and that run in float32 all the same, conversions back and forth, conversions that
    take more than 3 % of the time, operators that no runtime knows.
    """
    from edgekit.benchmark.request import make_request, take_samples
    from edgekit.compiler.audit import audit_runtime
    from edgekit.compiler.graph import facts_of, read_onnx
    from edgekit.dataset.load import load_dataset
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    if model.suffix == ".tflite":
        raise UsageError("inspect.format", f"{model}: only ONNX models can be inspected.", hint="Time it: edgekit benchmark.")
    facts = facts_of(read_onnx(model))
    session = open_session(model, options=SessionOptions(threads=threads))
    inputs = session.inputs
    session.close()
    feeds = make_request(inputs) if data is None else take_samples(load_dataset(data, inputs).inputs, inputs)
    audit = audit_runtime(model, feeds, threads=threads)
    failed = is_strict and bool(audit.findings)
    if is_json:
        out_json(audit)
        return 1 if failed else 0
    size = format_bytes(model.stat().st_size)
    kind = "quantized" if facts.is_quantized else "float16 weights" if facts.has_float16_weights else "float32"
    out(f"{model.name}: {size}, {facts.parameters:,} parameters, {kind}, operator set {facts.opset}")
    operators = sorted(facts.operators.items(), key=lambda item: -item[1])
    out("in the file: " + ", ".join(f"{count} {name}" for name, count in operators))
    out()
    spent: dict[tuple[str, str], list[float]] = {}
    for kernel in audit.kernels:
        spent.setdefault((kernel.op_type, kernel.precision), []).append(kernel.ms or 0.0)
    total = audit.total_ms or 1.0
    rows = [
        [name, precision, str(len(values)), f"{sum(values):.3f}", f"{sum(values) / total:.0%}"]
        for (name, precision), values in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    out(table(["what runs", "precision", "nodes", "ms", "share"], rows, right=[2, 3, 4]))
    if has_nodes:
        out()
        nodes = [[kernel.node, kernel.op_type, kernel.precision, f"{kernel.ms or 0:.4f}"] for kernel in audit.kernels]
        out(table(["node", "operator", "precision", "ms"], nodes, right=[3]))
    out()
    if not audit.findings:
        out(paint("nothing found: every quantized layer runs in integers, conversions cost little", "green"))
    for finding in audit.findings:
        cost = f" ({finding.ms:.3f} ms)" if finding.ms is not None else ""
        out(f"{paint(finding.kind, 'yellow')}  {finding.text}{cost}")
        out(f"    {finding.repair}")
    if failed:
        note(f"--strict: {len(audit.findings)} findings", "red")
    return 1 if failed else 0
