"""A real MLflow registry (an SQLite file), in an environment of its own: releases go in, models come out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from registry_world import Registry
from releases import linear_model

from edgekit.errors import UsageError
from edgekit.repository.mlflow import ORIGIN_FILE, Origin, export_release, import_model
from edgekit.schema.base import decode_json
from edgekit.schema.digest import digest_bytes

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("EDGEKIT_VENV", ROOT / ".venv")) / "peers"
PYTHON = PEERS / "mlflow" / "bin" / "python"
REASON = PEERS / "mlflow.missing"
needs_mlflow = pytest.mark.skipif(
    not PYTHON.is_file(), reason=REASON.read_text().strip() if REASON.is_file() else "scripts/peer-tools mlflow was not run"
)


DRIVER = """
import contextlib, io, json, sys
from edgekit.cli.main import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["repo", *arguments])
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run(folder, *commands, python=PYTHON):
    """The command line in that environment, edgekit from its checkout: code, stdout and stderr of each command."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(
        [str(python), "-c", DRIVER, json.dumps([list(map(str, arguments)) for arguments in commands])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    made = Registry(tmp_path_factory.mktemp("mlflow") / "w")
    made.make()
    made.publish("1.0.0")
    made.promote()
    made.publish("1.1.0")
    return made


@needs_mlflow
def test_release_goes_into_a_registry_and_comes_out_again(registry):
    folder, uri = registry.folder, f"sqlite:///{registry.folder}/mlflow.db"
    place = ["--mlflow", uri]
    one, two, back, again, absent = run(
        folder,
        ["export", registry.repo, "kws@1.0.0", *place, "--json"],
        ["export", registry.repo, "kws@1.0.0", *place],
        ["import", "models:/kws@staging", *place, "--out", folder / "back"],
        ["import", "models:/kws/1", *place, "--out", folder / "back"],
        ["import", "models:/kws/7", *place, "--out", folder / "none"],
    )
    assert one[0] == 0, one
    first = json.loads(one[1])
    assert (first["model"], first["model_version"], first["aliases"], first["is_new"]) == ("kws", "1", ["staging"], True)
    assert (two[0], two[1].split("  ")[0], "was registered before" in two[1]) == (0, "models:/kws/1", True), two
    assert back[0] == 0, back
    assert (folder / "back" / "model.onnx").read_bytes() == linear_model()
    origin = decode_json((folder / "back" / ORIGIN_FILE).read_bytes(), Origin)
    assert (origin.name, origin.version, origin.run_id) == ("kws", "1", first["run_id"])
    assert origin.digest == digest_bytes(linear_model())
    assert origin.tags["edgekit.release"] == "kws@1.0.0"
    assert origin.tags["edgekit.counter"] == "2"
    assert origin.metrics["size_bytes"] == float(len(linear_model()))
    assert origin.parameters["pass_1"] == "optimize-graph(level=2)"
    assert origin.parameters["source"] == "m.onnx"
    assert (again[0], "is there already" in again[2]) == (2, True), again
    assert (absent[0], "MLflow refuses" in absent[2]) == (3, True), absent
    assert not (folder / "none").exists()


def test_without_mlflow_it_says_what_to_install(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError) as caught:
        export_release(registry.repo, "kws", "1.0.0", uri="sqlite:///x.db")
    assert (caught.value.code, "pip install mlflow-skinny" in caught.value.hint) == ("mlflow.missing", True)


@pytest.mark.parametrize("uri", ["kws", "models:/kws", "models:/kws/latest", "runs:/abc/model"])
def test_model_that_is_none_is_refused(tmp_path, uri):
    with pytest.raises(UsageError) as caught:
        import_model(uri, tmp_path / "o", uri="sqlite:///x.db")
    assert caught.value.code == "mlflow.uri"
