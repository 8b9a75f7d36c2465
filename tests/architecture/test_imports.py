"""The fresh-interpreter test: what a program really loads, which the static import graph does not show."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import edgekit

DEVICE_FORBIDDEN = {
    "torch",
    "onnx",
    "pandas",
    "fastapi",
    "sqlalchemy",
    "cryptography",
    "pyarrow",
    "typer",
    "edgekit.trust.signer",
    "edgekit.bundle.writer",
    "edgekit.repository",
    "edgekit.compiler",
    "edgekit.fleet",
}
FLEET_FORBIDDEN = {
    "torch",
    "onnx",
    "pandas",
    "onnxruntime",
    "edgekit.trust.signer",
    "edgekit.bundle.writer",
    "edgekit.repository",
    "edgekit.compiler",
    "edgekit.agent",
}
FRAMEWORKS = {"torch", "onnx", "onnxruntime", "pandas", "fastapi", "sqlalchemy", "paho", "tuf", "cryptography", "numpy"}


def loaded_by(*modules: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after importing these modules."""
    code = f"import importlib, json, sys\nfor m in {list(modules)!r}: importlib.import_module(m)\n"
    code += "print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def modules_of(package: str) -> list[str]:
    path = [f"{edgekit.__path__[0]}/{package}"]
    prefix = f"edgekit.{package}."
    return [
        info.name for info in pkgutil.walk_packages(path, prefix) if not info.name.endswith(("__main__", "migrations.env"))
    ]  # alembic runs these


@pytest.mark.parametrize(("package", "forbidden"), [("agent", DEVICE_FORBIDDEN), ("fleet", FLEET_FORBIDDEN)])
def test_program_loads_nothing_foreign(package, forbidden):
    modules = modules_of(package)
    assert len(modules) > 3
    assert loaded_by(*modules) & forbidden == set()


def test_help_loads_no_framework():
    assert loaded_by("edgekit.cli.main") & FRAMEWORKS == set()


def test_package_init_files_hold_a_docstring_only():
    for info in pkgutil.walk_packages(edgekit.__path__, "edgekit."):
        if info.ispkg:
            source = (info.module_finder.find_spec(info.name).loader.get_source(info.name) or "").strip()
            assert source.startswith('"""'), info.name
            assert source.endswith('"""'), info.name
            assert source.count('"""') == 2, info.name
