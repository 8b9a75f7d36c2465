"""MODEL, as the user wrote it, made into something that can be optimized.

``model.onnx``, or ``package.module:name`` / ``file.py:name`` where the name is a factory that returns a torch ``nn.Module``, a
module itself, or a ``TrainTask``. Example inputs come from ``example_inputs()`` beside the factory, from the task, from
``--input name=shape``, or from the shapes of the calibration data.

    >>> source = load_source("model.py:create", weights=Path("weights.pt"))   # doctest: +SKIP
    >>> source.kind, source.digest                                             # doctest: +SKIP
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.compiler.task import TrainTask
from edgekit.dataset.data import suggest
from edgekit.dataset.function import is_function_spec, load_attribute
from edgekit.errors import ArtifactError, DataError, EdgekitError, EnvironmentFault, UsageError
from edgekit.schema.candidate import SourceModel
from edgekit.schema.digest import digest_file

if TYPE_CHECKING:
    from torch import Tensor, nn

LISTED_KEYS = 5
_KINDS = "an .onnx file, package.module:factory or file.py:factory"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What MODEL turned out to be: ``path`` for ONNX, ``module`` with ``example_inputs`` for torch."""

    model: SourceModel
    stem: str
    path: Path | None = None
    module: Any | None = None
    task: TrainTask | None = None
    example_inputs: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()


def load_source(
    spec: str,
    *,
    weights: Path | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    data: str | None = None,
    seed: int = 0,
) -> Source:
    """Load MODEL.

    Args:
        spec: as the user wrote it.
        weights: state dict for a torch model.
        input_shapes: shape by input name, batch axis first, for torch models without example inputs.
        data: the calibration data as the user wrote it; the last resort for the shapes of example inputs.
        seed: for factories that draw random weights.

    Raises:
        UsageError: ``model.not_found``, ``model.unsupported``, ``model.import_failed``, ``model.not_a_module``,
            ``model.no_example_inputs``, ``weights.not_for_onnx``, ``weights.not_found``.
        ArtifactError: ``model.unloadable``, ``weights.unreadable``, ``weights.mismatch``.
        EnvironmentFault: ``package.missing`` when torch is not installed.
    """
    if is_function_spec(spec):
        return _load_torch(spec, weights, dict(input_shapes or {}), data, seed)
    path = Path(spec)
    if not path.is_file():
        raise UsageError("model.not_found", f"{spec}: no such model.", hint=_near(path))
    if path.suffix.lower() != ".onnx":
        raise UsageError("model.unsupported", f"{spec}: not a kind of model that edgekit optimizes.", hint=f"Give {_KINDS}.")
    for value, flag in ((weights, "--weights"), (input_shapes, "--input")):
        if value:
            text = f"{flag} is for torch models; {spec} has its weights and shapes in the file."
            raise UsageError("weights.not_for_onnx", text)
    digest, size = _digest_with_data(path)
    return Source(model=SourceModel(spec=spec, kind="onnx", digest=digest, size_bytes=size), stem=stem_of(spec), path=path)


def _near(path: Path) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return suggest(path.name, names, otherwise=f"Give {_KINDS}.")


def _digest_with_data(path: Path) -> tuple[str, int]:
    """Digest and size of the file together with its external data, without reading weights into memory."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    size = path.stat().st_size
    try:
        proto = onnx.load(path, load_external_data=False)
        tensors = [tensor for tensor in _get_all_tensors(proto) if uses_external_data(tensor)]
    except Exception:  # noqa: BLE001  the reader says what is wrong with it, in its own words
        return digest_file(path), size
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    files = [path.parent / name for name in sorted(names)]
    if not files or not all(file.is_file() for file in files):
        return digest_file(path), size
    state = hashlib.sha256(digest_file(path).encode())
    for file in files:
        state.update(digest_file(file).encode())
        size += file.stat().st_size
    return "sha256:" + state.hexdigest(), size


def _load_torch(spec: str, weights: Path | None, shapes: dict[str, tuple[int, ...]], data: str | None, seed: int) -> Source:
    torch = _import_torch()
    if weights is not None and not weights.is_file():
        raise UsageError("weights.not_found", f"{weights}: no such weights file.", hint=_near(weights))
    try:
        found = load_attribute(spec)
    except DataError as error:
        code = "model.not_found" if error.code == "data.not_found" else "model.import_failed"
        raise UsageError(code, error.message, hint=error.hint.replace("function", "factory")) from error
    torch.manual_seed(seed)
    made = _make(found, spec)
    task = made if isinstance(made, TrainTask) and not isinstance(made, torch.nn.Module) else None
    module: nn.Module = _call(task.model, spec) if task else made
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            "model.not_a_module",
            f"{spec}: gives {type(module).__name__}; expected a torch nn.Module, a factory of one, or a TrainTask.",
            hint="A TrainTask has data_digest, trained_dir, model, example_inputs, train_batches, loss and metric.",
        )
    module = module.cpu().float().eval()
    if weights is not None:
        load_weights(module, weights)
    for parameter in module.parameters():
        parameter.requires_grad_(True)  # noqa: FBT003  torch's signature
    examples, notes = _shaped(shapes) or _declared(spec, found, task) or _fitting(spec, module, data)
    return Source(
        model=SourceModel(spec=spec, kind="torch", digest=_digest_torch(found, module), size_bytes=_size_of(module)),
        stem=stem_of(spec),
        module=module,
        task=task,
        example_inputs=tuple(example.cpu() for example in examples),
        notes=notes,
    )


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EnvironmentFault(
            "package.missing", "a torch model needs the package torch.", hint='pip install "edgekit[optimize]"'
        ) from error
    return torch


def stem_of(spec: str) -> str:
    """A name for the output folder: the file's, or its folder's where the file is called model.py or task.py."""
    if not is_function_spec(spec):
        return Path(spec).stem
    module, _, name = spec.rpartition(":")
    path = Path(module)
    if module.endswith(".py"):
        return path.resolve().parent.name if path.stem in ("model", "task", "__init__") else path.stem
    return f"{module.rpartition('.')[2]}-{name}"


def _make(found: Any, spec: str) -> Any:
    """The object itself, or what the factory returns."""
    import torch

    if isinstance(found, torch.nn.Module) or (isinstance(found, TrainTask) and not inspect.isclass(found)):
        return found
    if callable(found):
        return _call(found, spec)
    raise UsageError(
        "model.not_a_module",
        f"{spec}: is {type(found).__name__}; expected a torch nn.Module, a factory of one, or a TrainTask.",
        hint="Name a function without arguments that returns the module.",
    )


def _call(function: Any, spec: str) -> Any:
    try:
        return function()
    except EdgekitError:
        raise
    except Exception as error:
        raise UsageError(
            "model.import_failed",
            f"{spec}: calling it failed: {type(error).__name__}: {error}.",
            hint="The factory is called without arguments.",
        ) from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict into a module, without running code from the file.

    Raises:
        ArtifactError: ``weights.unreadable`` when it is not a file of tensors, ``weights.mismatch`` when keys or shapes differ.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            "weights.unreadable",
            f"{path}: not a file of weights that can be loaded safely: {line[:200]}",
            hint="Save it with torch.save(model.state_dict(), path): whole pickled models run code and are refused.",
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ArtifactError(
            "weights.unreadable", f"{path}: not a state dict.", hint="Save it with torch.save(model.state_dict(), path)."
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    _check_state(module, state, path)
    module.load_state_dict(state)


def _check_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for key in own:
        if key not in state and key.endswith("num_batches_tracked"):
            state[key] = own[key]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:LISTED_KEYS])}{', …' if len(found) > LISTED_KEYS else ''})"
        for found, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if found
    ]
    if parts:
        near = difflib.get_close_matches(missing[0], unexpected, n=1) if missing and unexpected else []
        hint = f'"{near[0]}" looks like "{missing[0]}": was the model renamed?' if near else ""
        raise ArtifactError(
            "weights.mismatch",
            f"{path}: does not fit {type(module).__name__}: {'; '.join(parts)}.",
            hint=hint or "Give the weights of this architecture, or the factory of the weights' architecture.",
        )


Examples = tuple[tuple["Tensor", ...], tuple[str, ...]]


def _shaped(shapes: dict[str, tuple[int, ...]]) -> Examples | None:
    """Zeros of the shapes that the user gave."""
    import torch

    return (tuple(torch.zeros(shape) for shape in shapes.values()), ()) if shapes else None


def _declared(spec: str, found: Any, task: TrainTask | None) -> Examples | None:
    """What ``example_inputs()`` of the task, or beside the factory, gives."""
    import torch

    beside = getattr(sys.modules.get(getattr(found, "__module__", "") or ""), "example_inputs", None)
    maker = task.example_inputs if task else beside or _sibling(spec)
    if not callable(maker):
        return None
    examples = _call(maker, spec)
    examples = (examples,) if isinstance(examples, torch.Tensor) else tuple(examples)
    if examples and all(isinstance(example, torch.Tensor) for example in examples):
        return examples, ()
    raise UsageError("model.no_example_inputs", f"{spec}: example_inputs() must return a tuple of tensors.")


def _fitting(spec: str, module: nn.Module, data: str | None) -> Examples:
    """Samples of the calibration data."""
    if data is not None and (examples := _examples_from(data, module)):
        return examples, ("example inputs have the shapes of the calibration data",)
    raise UsageError(
        "model.no_example_inputs",
        f"{spec}: the shapes of the model's inputs are not known.",
        hint="Add example_inputs() beside the factory, or give --input name=1,3,224,224 for each input.",
    )


def _sibling(spec: str) -> Any:
    try:
        return load_attribute(spec.rpartition(":")[0] + ":example_inputs")
    except DataError:
        return None


def _examples_from(data: str, module: nn.Module) -> tuple[Tensor, ...]:
    """One sample of each input from an ``.npz``; empty where the names do not say which is which."""
    import torch

    from edgekit.compiler.export import name_inputs

    if not data.endswith(".npz") or not Path(data).is_file():
        return ()
    try:
        with np.load(data, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name != "labels"]
            wanted = name_inputs(module, len(names))
            chosen = [name for name in wanted if name in names] if len(names) > 1 else names
            if len(chosen) != len(names):
                return ()
            return tuple(torch.from_numpy(np.ascontiguousarray(arrays[name][:1])) for name in chosen)
    except (OSError, ValueError, IndexError, TypeError):
        return ()


def _digest_torch(found: Any, module: nn.Module) -> str:
    """Of the weights and of the source file that defines the architecture."""
    from edgekit.compiler.passes.on_torch.kept import digest_state

    state = hashlib.sha256(digest_state(module).encode())
    for thing in (found, type(module)):
        try:
            path = inspect.getsourcefile(thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing))
        except TypeError:
            path = None
        if path and Path(path).is_file():
            state.update(digest_file(Path(path)).encode())
    return "sha256:" + state.hexdigest()


def _size_of(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
