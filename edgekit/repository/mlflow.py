"""To and from an MLflow model registry: a release becomes a registered model version, a registered model a file to optimize.

MLflow is optional and imported when it is asked for; ``mlflow-skinny`` is enough. A release is logged as one run: its manifest
and blobs as artifacts, figures as metrics, the way it was made as parameters. The version's tags name digests and counter; it
gets the alias of each channel whose newest release it is. Sealed blobs stay sealed. Where the manifest is registered already,
only tags and aliases are brought up to date.

What comes from a registry is trusted by nobody here: it is a model to begin with, whose origin is written beside it.

    >>> export_release(Path("repository"), "fashion", "1.1.0", uri="sqlite:///mlflow.db").model_version  # doctest: +SKIP
    '3'
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit.bundle.layout import MANIFEST_NAME, blob_name
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, EnvironmentFault, RepositoryError, UsageError
from edgekit.repository.lineage import Lineage, VariantLineage, trace
from edgekit.repository.publishing import find_release, load_manifest
from edgekit.repository.store import Store
from edgekit.schema.base import SCHEMA_VERSION, Record, encode_json
from edgekit.schema.digest import Digest, digest_file
from edgekit.schema.manifest import Manifest
from edgekit.schema.release import Release

ORIGIN_FILE = "mlflow-origin.json"
MANIFEST_TAG = "edgekit.manifest"
_ARTIFACTS = "release"
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))\Z")
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@")
_MAX_PARAMETER = 500


class Exported(Record, frozen=True, kw_only=True):
    """What became of a release in the registry."""

    model: str
    model_version: str
    run_id: str
    aliases: tuple[str, ...]
    is_new: bool
    """False where its manifest was registered before."""


class Origin(Record, frozen=True, kw_only=True):
    """Where an imported model came from; written beside it."""

    uri: str
    """As it was asked for: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``."""
    registry: str
    """Without a password."""
    name: str
    version: str
    run_id: str
    source: str
    file: str
    digest: Digest
    size_bytes: int
    imported_at: datetime
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = {}  # noqa: RUF012 - msgspec copies it
    metrics: dict[str, float] = {}  # noqa: RUF012 - the same
    parameters: dict[str, str] = {}  # noqa: RUF012 - the same
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class _Registry:
    """A client of one registry."""

    uri: str
    client: Any
    module: Any


def _public(uri: str) -> str:
    """The address without a user's name and password."""
    return _CREDENTIALS.sub("", uri)


@contextlib.contextmanager
def _registry(uri: str) -> Iterator[_Registry]:
    """Open a registry; what MLflow raises meanwhile becomes one error.

    Raises:
        UsageError: ``mlflow.missing``.
        EnvironmentFault: ``mlflow.failed``.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
    try:
        module = importlib.import_module("mlflow")
    except ImportError as error:
        raise UsageError(
            "mlflow.missing",
            "MLflow is not installed beside edgekit.",
            hint="pip install mlflow-skinny (with sqlalchemy and alembic for an sqlite:/// registry), best in an environment "
            "of its own.",
        ) from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        yield _Registry(uri, module.MlflowClient(tracking_uri=uri, registry_uri=uri), module)
    except module.exceptions.MlflowException as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(
            "mlflow.failed",
            f"{_public(uri)}: MLflow refuses: {_public(text)}",
            hint="Check the --mlflow URI; credentials are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        ) from error


# --- export -----------------------------------------------------------------------------------------------------------------


def export_release(folder: Path, name: str, version: str, *, uri: str, model: str = "") -> Exported:
    """Register a release.

    Args:
        folder: of the repository.
        name: of the model.
        version: of the release.
        uri: of the MLflow server or store.
        model: the registered model's name; empty is the model's own.

    Raises:
        UsageError: ``mlflow.missing``.
        EnvironmentFault: ``mlflow.failed``.
        RepositoryError: ``repository.no_release``, ``repository.damaged``.
    """
    lineage = trace(folder, name, version)
    release = find_release(Store.open(folder).chain(), name, version)
    manifest, data = load_manifest(folder, release)
    registered = model or name
    with _registry(uri) as registry:
        found = _known_version(registry, registered, release)
        if found is None:
            run_id = _log_run(registry, lineage, manifest, data, folder)
            made = registry.client.create_model_version(
                registered, source=f"runs:/{run_id}/{_ARTIFACTS}", run_id=run_id, tags=_tags(lineage, release)
            )
        else:
            made, run_id = found, found.run_id or ""
            for key, value in _tags(lineage, release).items():
                registry.client.set_model_version_tag(registered, made.version, key, value)
        aliases = tuple(sorted(place.channel for place in lineage.placements if place.is_newest))
        for alias in aliases:
            registry.client.set_registered_model_alias(registered, alias, made.version)
    return Exported(model=registered, model_version=str(made.version), run_id=run_id, aliases=aliases, is_new=found is None)


def _known_version(registry: _Registry, model: str, release: Release) -> Any:
    """The version that has this manifest; the registered model is made where it is missing."""
    quoted = model.replace("'", "\\'")
    if not registry.client.search_registered_models(filter_string=f"name = '{quoted}'"):
        registry.client.create_registered_model(model)
        return None
    versions = registry.client.search_model_versions(f"name = '{quoted}'")
    return next((each for each in versions if each.tags.get(MANIFEST_TAG) == release.manifest_digest), None)


def _tags(lineage: Lineage, release: Release) -> dict[str, str]:
    tags = {
        "edgekit.release": f"{lineage.name}@{lineage.version}",
        "edgekit.counter": str(release.info.counter),
        "edgekit.channels": ", ".join(place.channel for place in lineage.placements),
        "edgekit.version": lineage.edgekit_version,
        MANIFEST_TAG: release.manifest_digest,
    }
    return tags | {f"edgekit.model.{variant.name}": variant.model.digest for variant in lineage.variants}


def _log_run(registry: _Registry, lineage: Lineage, manifest: Manifest, data: bytes, folder: Path) -> str:
    client, entities = registry.client, registry.module.entities
    label = f"edgekit/{lineage.name}"
    experiment = client.get_experiment_by_name(label)
    place = experiment.experiment_id if experiment else client.create_experiment(label)
    run = client.create_run(place, run_name=f"{lineage.name}@{lineage.version}")
    run_id = str(run.info.run_id)
    try:
        now = int(datetime.now(UTC).timestamp() * 1000)
        metrics = [entities.Metric(key, value, now, 0) for key, value in _metrics(lineage).items()]
        parameters = [entities.Param(key, value[:_MAX_PARAMETER]) for key, value in _parameters(lineage).items()]
        client.log_batch(run_id, metrics=metrics, params=parameters)
        with tempfile.TemporaryDirectory(prefix="edgekit-mlflow-") as temporary:
            _lay_out(folder, manifest, data, Path(temporary))
            client.log_artifacts(run_id, temporary, artifact_path=_ARTIFACTS)
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)
    return run_id


def _lay_out(folder: Path, manifest: Manifest, data: bytes, place: Path) -> None:
    """The release's files under their names for people, each compared with its digest."""
    (place / MANIFEST_NAME).write_bytes(data)
    for ref in manifest.blobs:
        path = place / ref.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(folder / blob_name(ref.digest), path)
        except OSError as error:
            raise RepositoryError("repository.damaged", f"{ref.path}: its blob cannot be read: {error.strerror}.") from error
        if digest_file(path) != ref.digest:
            raise RepositoryError(
                "repository.damaged", f"{ref.path}: its blob changed after it was published.", hint="Publish the bundle again."
            )


def _prefixed(lineage: Lineage) -> Iterator[tuple[str, VariantLineage]]:
    """Variants with a prefix for their keys: none for the preferred one."""
    for number, variant in enumerate(lineage.variants):
        yield (f"{variant.name}/" if number else ""), variant


def _metrics(lineage: Lineage) -> dict[str, float]:
    found: dict[str, float] = {}
    for prefix, variant in _prefixed(lineage):
        found[f"{prefix}size_bytes"] = float(variant.model.size_bytes)
        if variant.evaluation is not None:
            report = variant.evaluation
            found[f"{prefix}{report.metric}"] = report.value
            found[f"{prefix}{report.metric}_drop"] = report.drop
            found |= {f"{prefix}{key}": value for key, value in report.extra.items()}
        if variant.latency is not None:
            found |= {f"{prefix}latency_p50_ms": variant.latency.p50_ms, f"{prefix}latency_p99_ms": variant.latency.p99_ms}
    return found


def _parameters(lineage: Lineage) -> dict[str, str]:
    found: dict[str, str] = {}
    for prefix, variant in _prefixed(lineage):
        found |= {
            f"{prefix}target": variant.target,
            f"{prefix}precision": variant.precision,
            f"{prefix}source": variant.source.spec,
            f"{prefix}source_digest": variant.source.digest,
            f"{prefix}seed": str(variant.seed),
        }
        for number, step in enumerate(variant.passes, 1):
            settings = ", ".join(f"{key}={value}" for key, value in step.settings.items())
            found[f"{prefix}pass_{number}"] = f"{step.name}({settings})"
    return found


# --- import -----------------------------------------------------------------------------------------------------------------


def import_model(model_uri: str, out: Path, *, uri: str, file: str = "") -> Origin:
    """Fetch a registered model version's ONNX file, with what lies beside it.

    Args:
        model_uri: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        out: a folder, new or empty.
        uri: of the MLflow server or store.
        file: which ``.onnx`` of the artifact; needed where it has several.

    Raises:
        UsageError: ``mlflow.missing``, ``mlflow.uri``, ``mlflow.occupied``, ``mlflow.file`` when there are several.
        ArtifactError: ``mlflow.no_model`` when there is none.
        EnvironmentFault: ``mlflow.failed``.
    """
    match = _MODEL_URI.match(model_uri)
    if match is None:
        raise UsageError(
            "mlflow.uri", f"{model_uri}: not a registered model.", hint="Write models:/NAME/VERSION or models:/NAME@ALIAS."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("mlflow.occupied", f"{out}: is there already.", hint="Give a new or an empty folder.")
    with _registry(uri) as registry, tempfile.TemporaryDirectory(prefix="edgekit-mlflow-") as temporary:
        client = registry.client
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
        place = client.get_model_version_download_uri(version.name, version.version)
        fetched = Path(
            registry.module.artifacts.download_artifacts(
                artifact_uri=place, dst_path=temporary, tracking_uri=uri, registry_uri=uri
            )
        )
        model = _pick(fetched, file, model_uri)
        _copy_siblings(model, out)
        origin = _origin(registry, version, model_uri, out / model.name)
    write_durably(out / ORIGIN_FILE, [encode_json(origin)])
    return origin


def _pick(fetched: Path, file: str, model_uri: str) -> Path:
    found = [path for path in sorted(fetched.rglob("*.onnx")) if path.is_file() and not path.is_symlink()]
    names = [str(path.relative_to(fetched)) for path in found]
    if file:
        if file not in names:
            raise UsageError("mlflow.file", f"--file {file}: not in {model_uri}.", hint=f"It has {', '.join(names) or 'none'}.")
        return found[names.index(file)]
    if not found:
        raise ArtifactError("mlflow.no_model", f"{model_uri}: has no .onnx file.", hint="Log the model with mlflow.onnx.")
    if len(found) > 1:
        raise UsageError(
            "mlflow.file", f"{model_uri}: has several models.", hint=f"Choose one with --file: {', '.join(names)}."
        )
    return found[0]


def _copy_siblings(model: Path, out: Path) -> None:
    """The model and the files beside it: weights of large models lie in files of their own."""
    for path in sorted(model.parent.iterdir()):
        if path.is_file() and not path.is_symlink() and (path == model or path.suffix != ".onnx"):
            with path.open("rb") as source:
                write_durably(out / path.name, iter(lambda: source.read(1 << 20), b""))


def _origin(registry: _Registry, version: Any, model_uri: str, path: Path) -> Origin:
    run = registry.client.get_run(version.run_id) if version.run_id else None
    return Origin(
        uri=model_uri,
        registry=_public(registry.uri),
        name=version.name,
        version=str(version.version),
        run_id=version.run_id or "",
        source=_public(version.source or ""),
        file=path.name,
        digest=digest_file(path),
        size_bytes=path.stat().st_size,
        imported_at=datetime.now(UTC),
        aliases=tuple(version.aliases),
        tags={str(key): str(value) for key, value in version.tags.items()},
        metrics={key: float(value) for key, value in run.data.metrics.items()} if run else {},
        parameters={key: str(value) for key, value in run.data.params.items()} if run else {},
    )
