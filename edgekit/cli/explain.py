"""``edgekit explain``: how a candidate came to be, and whether the same steps give the same bytes again."""

from __future__ import annotations

from pathlib import Path

import typer

from edgekit.cli.console import Progress, format_bytes, format_seconds, out, out_json, paint

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
LONG = 100


@app.command()
def explain(
    folder: Path = typer.Argument(..., metavar="DIR", help="An output folder of edgekit optimize."),
    candidate: str | None = typer.Option(None, "--candidate", "-c", help="Its name; default: the chosen one."),
    is_again: bool = typer.Option(
        False, "--again", help="Run every step again and compare the bytes; exit 1 when one differs."
    ),
    is_json: bool = typer.Option(False, "--json", help="Print the record (with --again: the checks) as JSON."),
    is_quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress on stderr."),
) -> int:
    """Show how a candidate in DIR came to be: source, data, every step with its settings and versions.

    With --again the model and the data must lie where the run found them, seen from the present folder.
    """
    from edgekit.compiler.explain import read_explanation, run_again

    explanation = read_explanation(folder, candidate)
    record, request = explanation.candidate, explanation.result.request
    if not is_again:
        if is_json:
            out_json(record)
            return 0
        out(f"{record.name} for {record.target}: {record.verdict.status}, {record.verdict.reason}")
        size = format_bytes(record.source.size_bytes)
        out(f"from {record.source.spec} ({record.source.kind}, {size}, {record.source.digest})")
        for data in explanation.result.data:
            out(f"{data.role} {data.source} ({data.samples} samples, {data.digest})")
        out(f"effort {request.effort}, seed {request.seed}, edgekit {record.edgekit_version}")
        for index, step in enumerate(record.lineage, 1):
            out()
            versions = ", ".join(f"{name} {value}" for name, value in step.versions.items())
            out(f"{index} {paint(step.name, 'bold')}  {format_seconds(step.seconds)}  {versions}")
            for name, value in step.settings.items():
                text = str(value)
                out(f"    {name} = {text if len(text) <= LONG else f'{text[:LONG]}… ({len(text)} characters)'}")
            for text in step.notes:
                out(f"    {text}")
            out(f"    gives {step.output}")
        return 0
    progress = Progress(is_quiet=is_quiet)
    count = max(1, len(record.lineage))
    done = [0]

    def tell(name: str) -> None:
        done[0] += 1
        progress.update(f"again: {name}", done[0] / (count + 1))

    checks = run_again(explanation, tell)
    progress.clear()
    is_same = len(checks) == len(record.lineage) and all(check.is_same for check in checks)
    if is_json:
        out_json(checks)
        return 0 if is_same else 1
    for check in checks:
        mark = paint("same bytes", "green") if check.is_same else paint("differs", "red")
        out(f"{check.name}: {mark}{f' ({check.reason})' if check.reason else ''}")
        if not check.is_same:
            out(f"    then {check.expected}")
            out(f"    now  {check.found or 'not made'}")
        for package, (before, now) in check.changed_versions.items():
            out(f"    {package} was {before}, is {now}")
    out()
    out(f"{record.name}: {'made again, bit for bit' if is_same else 'not the same'}")
    return 0 if is_same else 1
