"""Data from the user's own code: ``package.module:function`` or ``file.py:function``, called without arguments.

The function returns a mapping of arrays by input name (``labels`` among them or not), a pair ``(inputs, labels)``, one array
for a single-input model, or an iterable of batches, each of which is one of these. Iterables are read to their end.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgekit.dataset.data import Array, suggest
from edgekit.dataset.fitting import INPUTS_NAME, LABELS_NAME, RawData
from edgekit.errors import DataError, EdgekitError
from edgekit.schema.tensor import TensorSpec

_SPEC = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)\Z")


def is_function_spec(spec: str) -> bool:
    """Whether the text has the form ``package.module:name`` or ``file.py:name``."""
    return _SPEC.match(spec) is not None


def load_attribute(spec: str) -> Any:
    """Import the module or file and return the named attribute.

    Raises:
        DataError: ``data.not_found`` when the file, module or attribute is not there; ``data.function_failed`` when the
            import itself fails.
    """
    match = _SPEC.match(spec)
    if match is None:
        raise DataError("data.not_found", f"{spec}: expected package.module:name or file.py:name.")
    with _importable(_folder(match["module"])):
        module = _load_module(match["module"], spec)
    if not hasattr(module, match["name"]):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise DataError(
            "data.not_found",
            f'{spec}: {match["module"]} has no "{match["name"]}".',
            hint=suggest(match["name"], public, otherwise="Name a function of that module."),
        )
    return getattr(module, match["name"])


def read_function(spec: str, inputs: Sequence[TensorSpec]) -> RawData:
    """Call the function and gather what it gives.

    Raises:
        DataError: as :func:`load_attribute`; ``data.function_failed`` when it raises; ``data.unreadable`` when its result is
            none of the accepted forms.
    """
    function = load_attribute(spec)
    if not callable(function):
        raise DataError("data.not_found", f"{spec}: not callable; expected a function without arguments.")
    with _importable(_folder(spec.rpartition(":")[0])):
        try:
            result = function()
            parts = list(_batches(result, spec, inputs))
        except EdgekitError:
            raise
        except Exception as error:
            raise DataError(
                "data.function_failed",
                f"{spec}: the function failed: {type(error).__name__}: {error}.",
                hint="Call it by itself to see where.",
            ) from error
    return _join(parts, spec)


def _folder(module: str) -> str:
    return str(Path(module).resolve().parent) if module.endswith(".py") else str(Path.cwd())


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules of this folder can be imported meanwhile, as if Python had been started on it."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _load_module(module: str, spec: str) -> ModuleType:
    path = Path(module)
    if module.endswith(".py") and not path.is_file():
        raise DataError("data.not_found", f"{spec}: there is no file {module}.", hint=_near_file(path))
    try:
        return _load_file(path) if module.endswith(".py") else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            hint = "Modules are looked for in the working folder and in the environment that runs edgekit."
            raise DataError("data.not_found", f"{spec}: there is no module {module}.", hint=hint) from error
        raise DataError("data.function_failed", f"{spec}: importing it failed: {error}.") from error
    except Exception as error:
        text = f"{spec}: importing it failed: {type(error).__name__}: {error}."
        raise DataError("data.function_failed", text, hint=f"Try: python {module}") from error


def _load_file(path: Path) -> ModuleType:
    name = f"edgekit_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.resolve())
    if found is None or found.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _near_file(path: Path) -> str:
    folder = path.parent
    return suggest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""


_Part = tuple[dict[str, Array], Array | None]


def _batches(result: Any, spec: str, inputs: Sequence[TensorSpec]) -> Iterator[_Part]:
    if isinstance(result, Mapping | tuple) or hasattr(result, "__array__"):
        yield _part(result, spec, inputs)
    elif isinstance(result, Iterable) and not isinstance(result, str | bytes):
        for batch in result:
            yield _part(batch, spec, inputs)
    else:
        raise _unreadable(spec, result)


def _part(value: Any, spec: str, inputs: Sequence[TensorSpec]) -> _Part:
    labels = None
    if isinstance(value, tuple | list) and len(value) == 2:
        value, labels = value
    if isinstance(value, Mapping):
        arrays = {str(name): np.asarray(array) for name, array in value.items()}
        if labels is None and LABELS_NAME not in {one.name for one in inputs}:
            labels = arrays.pop(LABELS_NAME, None)
    elif hasattr(value, "__array__"):
        arrays = {INPUTS_NAME: np.asarray(value)}
    else:
        raise _unreadable(spec, value)
    return arrays, None if labels is None else np.asarray(labels)


def _unreadable(spec: str, value: Any) -> DataError:
    return DataError(
        "data.unreadable",
        f"{spec}: returned {type(value).__name__}; expected a mapping of arrays, (inputs, labels), or an iterable of these.",
        hint='Return {"input name": array, "labels": array}.',
    )


def _join(parts: list[_Part], spec: str) -> RawData:
    if not parts:
        raise DataError("data.empty", f"{spec}: gave no batches.", hint="Generators are used up by one pass: make a new one.")
    if len(parts) == 1:
        return RawData(arrays=parts[0][0], labels=parts[0][1])
    first, first_labels = parts[0]
    for number, (arrays, labels) in enumerate(parts):
        if set(arrays) != set(first) or (labels is None) != (first_labels is None):
            raise DataError(
                "data.unreadable", f"{spec}: batch {number} does not hold the same arrays as batch 0: {', '.join(first)}."
            )
        for name, array in arrays.items():
            if array.shape[1:] != first[name].shape[1:] or array.ndim == 0:
                text = f'{spec}: input "{name}" has shape {array.shape} in batch {number}, {first[name].shape} in batch 0.'
                raise DataError("data.shape", text, hint="All samples must have one shape: pad or crop them.")
    joined = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in first}
    all_labels = [np.atleast_1d(labels) for _, labels in parts if labels is not None]
    return RawData(arrays=joined, labels=np.concatenate(all_labels) if all_labels else None)
