"""``edgekit predict``: run a model file, a bundle or a running agent's model on data, and show what it says."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import Progress, note, out, out_json, paint, table, warn
from edgekit.errors import DataError, EnvironmentFault, UsageError
from edgekit.schema.base import Record
from edgekit.schema.contract import Task

if TYPE_CHECKING:
    from edgekit.agent.client import Client
    from edgekit.bundle.reader import Bundle
    from edgekit.dataset.data import Array, Dataset
    from edgekit.runtime.session import Session
    from edgekit.schema.manifest import Manifest
    from edgekit.schema.tensor import TensorSpec

SHOWN_ROWS = 10
SHOWN_VALUES = 4
REQUEST_VALUES = 16_384
PATIENCE_SECONDS = 3.0
_OUT_SUFFIXES = (".npz", ".csv", ".parquet", ".json")
_SUM_TOLERANCE = 1e-2

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


class Prediction(Record, frozen=True, kw_only=True):
    """The answer to one sample; ``values`` is the first output, flat."""

    index: int
    values: tuple[float, ...]
    class_index: int | None = None
    label: str | None = None
    confidence: float | None = None
    expected: str | None = None
    threshold: float | None = None
    """The confidence from which an answer of this class counts, where the release says one."""

    @property
    def is_below_threshold(self) -> bool:
        """Whether the answer does not count."""
        return self.threshold is not None and (self.confidence or 0.0) < self.threshold


class PredictionReport(Record, frozen=True, kw_only=True):
    """The whole answer of ``edgekit predict --json``. ``score`` is top-1 accuracy, or the mean absolute error."""

    model: str
    version: str
    model_digest: str
    data: str
    data_digest: str
    task: Task
    samples: int
    metric: str | None
    score: float | None
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class _Model:
    """Which model answered; ``labels`` are the names of its classes, where they are known, ``thresholds`` are by class."""

    name: str
    version: str
    digest: str
    labels: tuple[str, ...]
    thresholds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What a model said of the data, wherever it ran."""

    model: _Model
    inputs: tuple[TensorSpec, ...]
    data: Dataset
    outputs: dict[str, Array]

    @property
    def first(self) -> Array:
        """The first output, [N, ...]."""
        return next(iter(self.outputs.values()))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes: the model's, else the data's, where they fit the output; or empty."""
        names = self.model.labels or self.data.class_names
        return names if self.first.ndim == 2 and len(names) == self.first.shape[1] else ()


def softmax(scores: Array) -> Array:
    """Probabilities [N, C]; scores that are probabilities already stay as they are."""
    import numpy as np

    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=-1), 1, atol=_SUM_TOLERANCE):
        return values
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


# --- where the model runs ---------------------------------------------------------------------------------------------------


def _known_labels(path: Path, digest: str) -> tuple[str, ...]:
    """Class names from the ``candidate.json`` beside a model that ``edgekit optimize`` wrote, if it speaks of this model."""
    from edgekit.errors import ArtifactError
    from edgekit.schema.base import decode_json
    from edgekit.schema.candidate import Candidate

    record = path.parent / "candidate.json"
    if not record.is_file():
        return ()
    try:
        candidate = decode_json(record.read_bytes(), Candidate, name=str(record))
    except ArtifactError as error:
        warn(f"{error.message} Class names are not taken from it.")
        return ()
    is_same = candidate.artifact is not None and candidate.artifact.digest == digest
    return candidate.contract.labels if is_same else ()


def _run(session: Session, spec: str, limit: int | None, model: _Model, manifest: Manifest | None = None) -> _Answers:
    from edgekit.cli.features_data import load_for_bundle
    from edgekit.dataset.load import load_dataset
    from edgekit.evaluation.evaluate import predict as run_all

    if manifest is not None:
        data = load_for_bundle(manifest, session.inputs, spec, limit=limit, class_names=model.labels)
    else:
        data = load_dataset(spec, session.inputs, limit=limit, class_names=model.labels)
    progress = Progress()
    try:
        outputs = run_all(session, data, on_progress=progress.update)
    finally:
        progress.clear()
    return _Answers(model=model, inputs=session.inputs, data=data, outputs=outputs)


def _ask_file(path: Path, spec: str, limit: int | None, labels: tuple[str, ...]) -> _Answers:
    """Run a model file; MODEL may be the folder that ``edgekit optimize`` wrote."""
    from edgekit.runtime.registry import open_session
    from edgekit.schema.digest import digest_file

    if path.is_dir():
        path = _model_in(path)
    if not path.is_file():
        raise UsageError("model.not_found", f"{path}: no such file.", hint="Give an .onnx, .tflite or .edgekit file.")
    session = open_session(path)
    try:
        digest = digest_file(path)
        model = _Model(name=str(path), version="", digest=digest, labels=labels or _known_labels(path, digest))
        return _run(session, spec, limit, model)
    finally:
        session.close()


def _model_in(folder: Path) -> Path:
    for name in ("model.onnx", "model.tflite"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        "model.not_found", f"{folder}: no model.onnx or model.tflite in this folder.", hint="Give the model's file."
    )


def _by_class(labels: Sequence[str], thresholds: Mapping[str, float]) -> dict[int, float]:
    return {index: thresholds[label] for index, label in enumerate(labels) if label in thresholds}


def _extract(bundle: Bundle, digest: str, file: Path, identity: str) -> None:
    """Write a blob of a bundle, opened where it is sealed."""
    from edgekit.bundle.opening import find_identities, open_sealed

    ref = next(ref for ref in bundle.manifest.blobs if ref.digest == digest)
    identities = find_identities([ref], identity, name=bundle.path.name)
    if identities is None:
        file.write_bytes(bundle.blob(digest))
        return
    sealed = file.with_suffix(".age")
    with sealed.open("wb") as part:
        part.writelines(bundle.chunks(digest))
    open_sealed(sealed, file, ref, identities)


def _ask_bundle(path: Path, spec: str, limit: int | None, labels: tuple[str, ...], identity: str) -> _Answers:
    """Run the variant that an agent on this machine would take."""
    import tempfile

    from edgekit.agent.facts import probe_facts
    from edgekit.agent.plan import choose_variant
    from edgekit.bundle.opening import opened_variant
    from edgekit.bundle.reader import read_bundle
    from edgekit.runtime.registry import open_session

    bundle = read_bundle(path)
    manifest = bundle.manifest
    variant = choose_variant(manifest, probe_facts())
    note(f"{manifest.name}@{manifest.version}, variant {variant.name}; its signature is not checked here", "dim")
    with tempfile.TemporaryDirectory(prefix="edgekit-predict-") as folder:
        file = Path(folder) / f"model.{variant.format}"
        _extract(bundle, variant.model, file, identity)
        opened = opened_variant(manifest, variant)
        session = open_session(file, format=variant.format)
        try:
            names = labels or manifest.contract.labels
            thresholds = _by_class(manifest.contract.labels, manifest.contract.thresholds)
            model = _Model(
                name=manifest.name, version=manifest.version, digest=opened.model, labels=names, thresholds=thresholds
            )
            return _run(session, spec, limit, model, manifest)
        finally:
            session.close()


def _only_model(client: Client) -> str:
    """The agent's one model."""
    names = client.models()
    if len(names) == 1:
        return names[0]
    served = f"it serves {', '.join(names)}" if names else "it serves no model"
    raise UsageError("predict.usage", f"--agent {client.url}: {served}.", hint="Name one with --model." if names else "")


def _ask_agent(client: Client, name: str, spec: str, limit: int | None, labels: tuple[str, ...]) -> _Answers:
    """Send the data to a running agent, a few samples a request."""
    import math

    import numpy as np

    from edgekit.dataset.load import load_dataset

    served = client.describe(name)
    names = labels or served.labels
    data = load_dataset(spec, served.inputs, limit=limit, class_names=names)
    per_sample = sum(math.prod(array.shape[1:]) for array in data.inputs.values())
    fixed = next((spec.shape[0] for spec in served.inputs if spec.shape and isinstance(spec.shape[0], int)), None)
    size = fixed or max(1, REQUEST_VALUES // max(1, per_sample))
    if fixed and len(data) % fixed:
        text = f"{spec}: {len(data)} samples, the served model takes batches of exactly {fixed}."
        raise DataError("data.shape", text, hint=f"Give a multiple of {fixed} samples, see --limit.")
    progress, parts, seen, changed = Progress(), [], {}, 0
    try:
        for number, (feeds, _labels) in enumerate(data.batches(size)):
            answer = client.predict(name, feeds)
            parts.append(answer.outputs)
            seen[answer.model_digest or served.digest] = answer.version or served.version
            changed += bool(answer.input_verdicts)
            progress.update("asking the agent", min(1.0, (number + 1) * size / len(data)))
    finally:
        progress.clear()
    if changed:
        warn(f"the input contract made exceptions in {changed} requests (clipped, filled in or passed with a note)")
    if len(seen) > 1:
        warn(f"the agent changed its model meanwhile: {', '.join(seen.values())} answered; the last is named")
    digest, version = list(seen.items())[-1]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    thresholds = _by_class(served.labels, served.thresholds)
    model = _Model(name=served.name, version=version, digest=digest, labels=names, thresholds=thresholds)
    return _Answers(model=model, inputs=served.inputs, data=data, outputs=outputs)


# --- what is shown ----------------------------------------------------------------------------------------------------------


def _task_of(answers: _Answers) -> Task:
    from typing import cast

    from edgekit.dataset.contract import infer_task
    from edgekit.schema.tensor import DType, TensorSpec

    outputs = [
        TensorSpec(name=name, dtype=cast("DType", array.dtype.name), shape=("batch", *array.shape[1:]))
        for name, array in answers.outputs.items()
    ]
    return infer_task(answers.data, answers.inputs, outputs, answers.labels)


def _score(answers: _Answers, task: Task) -> tuple[str | None, float | None]:
    """The metric that the labels allow, and its value; a mismatch is said, and does not stop the predictions."""
    import numpy as np

    from edgekit.evaluation.metric import Evidence, resolve_metric

    if answers.data.labels is None:
        return None, None
    metric = resolve_metric(None, has_labels=True, task=task)
    evidence = Evidence(
        outputs=answers.outputs, baseline=answers.outputs, labels=answers.data.labels, source=answers.data.source
    )
    try:
        return metric.name, float(np.mean(metric.score(evidence)))
    except UsageError as error:
        warn(f"no score: {error.message}")
        return None, None


def _predictions(answers: _Answers, task: Task) -> tuple[Prediction, ...]:
    first, expected = answers.first, _expected(answers)
    flat = first.reshape(len(first), -1).tolist()
    if task != "classification":
        return tuple(
            Prediction(index=i, values=tuple(flat[i]), expected=expected[i] if expected else None) for i in range(len(first))
        )
    probabilities = softmax(first)
    classes = first.argmax(axis=1).tolist()
    return tuple(
        Prediction(
            index=i,
            values=tuple(flat[i]),
            class_index=winner,
            label=_name(answers.labels, winner),
            confidence=float(probabilities[i, winner]),
            threshold=answers.model.thresholds.get(winner),
            expected=expected[i] if expected else None,
        )
        for i, winner in enumerate(classes)
    )


def _name(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else str(index)


def _expected(answers: _Answers) -> list[str]:
    labels = answers.data.labels
    if labels is None:
        return []
    if labels.ndim == 1 and labels.dtype.kind == "i":
        return [_name(answers.labels, int(value)) for value in labels]
    return [_numbers(row) for row in labels.reshape(len(labels), -1).tolist()]


def _numbers(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:.6g}" for value in values[:SHOWN_VALUES])
    return f"{shown} ..." if len(values) > SHOWN_VALUES else shown


def _report(answers: _Answers) -> PredictionReport:
    task = _task_of(answers)
    metric, score = _score(answers, task)
    return PredictionReport(
        model=answers.model.name,
        version=answers.model.version,
        model_digest=answers.model.digest,
        data=answers.data.source,
        data_digest=answers.data.digest,
        task=task,
        samples=len(answers.data),
        metric=metric,
        score=score,
        predictions=_predictions(answers, task),
    )


def _rows(report: PredictionReport) -> tuple[list[str], list[list[str]]]:
    """Header and first rows of the table for people."""
    has_expected = any(one.expected is not None for one in report.predictions)
    is_classified = report.task == "classification"
    headers = ["index", "predicted", *(["confidence"] if is_classified else []), *(["expected"] if has_expected else [])]
    rows = []
    for one in report.predictions[:SHOWN_ROWS]:
        label = f"{one.label} (below threshold {one.threshold:g})" if one.is_below_threshold else one.label or ""
        cells = [label, f"{one.confidence or 0:.4f}"] if is_classified else [_numbers(one.values)]
        rows.append([str(one.index), *cells, *([one.expected or ""] if has_expected else [])])
    return headers, rows


def _show(report: PredictionReport) -> None:
    headers, rows = _rows(report)
    out(table(headers, rows, right=[0, *([2] if report.task == "classification" else [])]))
    more = report.samples - len(rows)
    if more > 0:
        out(paint(f"... and {more} more (all of them with --out or --json)", "dim"))
    samples = "1 sample" if report.samples == 1 else f"{report.samples} samples"
    score = f", {report.metric} {report.score:.4f}" if report.score is not None else ""
    version = f" {report.version}" if report.version else ""
    below = sum(one.is_below_threshold for one in report.predictions)
    rest = f", {below} below the threshold of their label" if below else ""
    out(f"{report.model}{version}: {samples}{score}{rest}")


# --- what is written --------------------------------------------------------------------------------------------------------


def _check_out(path: Path) -> None:
    if path.suffix.lower() not in _OUT_SUFFIXES:
        text = f"--out {path}: cannot write this kind of file; expected {', '.join(_OUT_SUFFIXES)}."
        raise UsageError("predict.unknown_format", text)


def _write(path: Path, answers: _Answers, report: PredictionReport) -> None:
    from edgekit.durable import write_durably
    from edgekit.schema.base import encode_json

    match path.suffix.lower():
        case ".npz":
            data = _npz(answers, report)
        case ".csv":
            data = _csv(report)
        case ".parquet":
            data = _parquet(report)
        case _:
            data = encode_json(report)
    try:
        write_durably(path, data)
    except OSError as error:
        raise EnvironmentFault("output.unwritable", f"{path}: cannot be written: {error.strerror}.") from error
    note(f"wrote {path}")


def _npz(answers: _Answers, report: PredictionReport) -> bytes:
    """Every output by its name; ``predicted`` and ``labels`` beside them, unless an output has that name."""
    import numpy as np

    arrays: dict[str, Array] = {}
    if report.task == "classification":
        arrays["predicted"] = np.array([one.class_index for one in report.predictions], dtype=np.int64)
    if answers.data.labels is not None:
        arrays["labels"] = answers.data.labels
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **(arrays | answers.outputs))
    return buffer.getvalue()


def _columns(report: PredictionReport) -> dict[str, list[int | float | str | None]]:
    columns: dict[str, list[int | float | str | None]] = {"index": [one.index for one in report.predictions]}
    if report.task == "classification":
        columns["predicted"] = [one.label for one in report.predictions]
        columns["class_index"] = [one.class_index for one in report.predictions]
        columns["confidence"] = [one.confidence for one in report.predictions]
        if any(one.threshold is not None for one in report.predictions):
            columns["threshold"] = [one.threshold for one in report.predictions]
    if any(one.expected is not None for one in report.predictions):
        columns["expected"] = [one.expected for one in report.predictions]
    for place in range(len(report.predictions[0].values)):
        columns[f"value_{place}"] = [one.values[place] for one in report.predictions]
    return columns


def _csv(report: PredictionReport) -> bytes:
    columns = _columns(report)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return buffer.getvalue().encode()


def _parquet(report: PredictionReport) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        hint = "pip install pyarrow, or write .csv or .npz."
        raise EnvironmentFault("pyarrow.missing", "writing Parquet needs pyarrow.", hint=hint) from error
    buffer = io.BytesIO()
    pq.write_table(pa.table(_columns(report)), buffer)
    return buffer.getvalue()


# --- the command ------------------------------------------------------------------------------------------------------------


def _parse_labels(text: str) -> tuple[str, ...]:
    """Class names from a file with one a line, or from ``a,b,c``."""
    path = Path(text)
    if text and path.is_file():
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _answer(
    first: str, second: str, *, agent: str, model: str, limit: int | None, labels: tuple[str, ...], identity: str
) -> _Answers:
    if agent:
        from edgekit.agent.client import Client

        name, spec = (model, first) if not second else (model or first, second)
        if second and model and model != first:
            raise UsageError("predict.usage", "--agent: name one model.", hint="edgekit predict DATA --agent URL --model NAME")
        with Client(agent, patience_s=PATIENCE_SECONDS) as client:
            return _ask_agent(client, name or _only_model(client), spec, limit, labels)
    if model or not second:
        what = "--model goes with --agent." if model else f"{first}: the data is missing; expected MODEL and DATA."
        raise UsageError(
            "predict.usage", what, hint="edgekit predict MODEL DATA, or edgekit predict DATA --agent URL --model NAME"
        )
    if first.endswith(".edgekit"):
        return _ask_bundle(Path(first), second, limit, labels, identity)
    return _ask_file(Path(first), second, limit, labels)


@app.command()
def predict(
    *,
    first: str = typer.Argument(
        ..., metavar="MODEL", help="An .onnx or .tflite file, an .edgekit bundle; left out with --agent."
    ),
    second: str = typer.Argument("", metavar="DATA", help=".npz, .csv, .parquet, a folder of images, or module:function."),
    out_file: str = typer.Option("", "--out", metavar="FILE", help="Write all predictions: .npz, .csv, .parquet or .json."),
    labels: str = typer.Option("", "--labels", metavar="FILE|A,B,...", help="Class names: a file with one a line, or a list."),
    limit: int | None = typer.Option(None, "--limit", metavar="N", help="At most N samples, evenly spaced over the data."),
    json: bool = typer.Option(False, "--json", help="Print every prediction as JSON."),
    agent: str = typer.Option(
        "", "--agent", metavar="URL", help="Ask a running agent: http://127.0.0.1:8080, or unix:///PATH."
    ),
    model: str = typer.Option("", "--model", metavar="NAME", help="The model's name, with --agent; its only one without."),
    identity: str = typer.Option("", "--identity", metavar="FILE", help="The age identity that opens a sealed bundle."),
) -> None:
    """Run a model file, a bundle or a running agent's model on data.

    With labels in the data the accuracy (or mean absolute error) is shown too. A bundle's digests are checked, its signature
    is not: that is "edgekit bundle verify".
    """
    if out_file:
        _check_out(Path(out_file))
    answers = _answer(first, second, agent=agent, model=model, limit=limit, labels=_parse_labels(labels), identity=identity)
    _check_finite(answers)
    _check_label_count(labels, answers)
    report = _report(answers)
    for text in answers.data.notes:
        note(f"data: {text}", "dim")
    if out_file:
        _write(Path(out_file), answers, report)
    if json:
        out_json(report)
    else:
        _show(report)


def _check_finite(answers: _Answers) -> None:
    from edgekit.evaluation.evaluate import check_finite_output

    for name, array in answers.outputs.items():
        check_finite_output(array, f'output "{name}"')


def _check_label_count(labels: str, answers: _Answers) -> None:
    if labels and not answers.labels:
        given, shape = len(answers.model.labels), list(answers.first.shape[1:])
        text = f"--labels: {given} names, the first output has {shape} values a sample."
        raise UsageError("predict.labels", text, hint="Name every class, in the order of the model's output.")
