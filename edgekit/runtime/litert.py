"""Sessions over LiteRT (``ai-edge-litert``), or its predecessor ``tflite-runtime`` where only that is installed.

Names come from the model's signature where it has one, so that a converted model keeps the names of its source. A LiteRT model
has a fixed batch: where it is one for every input and output, the declared shapes say ``batch`` and
:meth:`LiteRTSession.run` feeds the samples one after the other; otherwise the shapes are the file's. Integer inputs and
outputs are declared as they are: quantizing them is the caller's part.

    >>> session = LiteRTSession(Path("model.tflite"), SessionOptions())  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ArtifactError, DataError, EnvironmentFault
from edgekit.runtime.feeds import check_feeds
from edgekit.runtime.session import Array, SessionOptions
from edgekit.schema.tensor import TensorSpec

_PACKAGES = (("ai_edge_litert.interpreter", "ai-edge-litert"), ("tflite_runtime.interpreter", "tflite-runtime"))


def _load_interpreter() -> tuple[Any, str]:
    """The interpreter module and its version."""
    for module, distribution in _PACKAGES:
        try:
            return importlib.import_module(module), importlib.metadata.version(distribution)
        except ImportError:
            continue
    raise EnvironmentFault("runtime.missing", "no LiteRT runtime is installed.", hint="pip install 'edgekit[litert-runtime]'.")


def _spec(name: str, details: dict[str, Any], *, is_batched: bool) -> TensorSpec:
    shape: tuple[int | str, ...] = tuple(int(axis) for axis in details["shape"])
    if is_batched:
        shape = ("batch", *shape[1:])
    return TensorSpec(name=name, dtype=np.dtype(details["dtype"]).name, shape=shape)


def _is_single(details: list[dict[str, Any]]) -> bool:
    """Whether axis 0 of every tensor is a batch of one."""
    return all(len(item["shape"]) > 0 and int(item["shape"][0]) == 1 for item in details)


class LiteRTSession:
    """One ``.tflite`` model: ``threads`` threads, XNNPACK unless ``is_optimized`` is False."""

    def __init__(self, path: Path, options: SessionOptions) -> None:
        module, self._version = _load_interpreter()
        resolver = module.OpResolverType
        kind = resolver.AUTO if options.is_optimized else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._name = path.name
        try:
            interpreter = module.Interpreter(
                model_content=path.read_bytes(), num_threads=options.threads, experimental_op_resolver_type=kind
            )
            interpreter.allocate_tensors()
        except Exception as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ArtifactError(
                "model.unloadable",
                f"{path}: LiteRT {self._version} cannot load it: {text}.",
                hint="Check that it is a complete .tflite file with built-in operators only.",
            ) from error
        self._interpreter = interpreter
        inputs, outputs = self._name_tensors()
        details = {item["index"]: item for item in [*interpreter.get_input_details(), *interpreter.get_output_details()]}
        self._is_batched = all(_is_single([details[index] for index in indices.values()]) for indices in (inputs, outputs))
        is_batched = self._is_batched
        self._input_index, self._output_index = inputs, outputs
        self._inputs = tuple(_spec(name, details[index], is_batched=is_batched) for name, index in inputs.items())
        self._outputs = tuple(_spec(name, details[index], is_batched=is_batched) for name, index in outputs.items())

    def _name_tensors(self) -> tuple[dict[str, int], dict[str, int]]:
        """Tensor index by name, for inputs and outputs: signature names first, tensor names otherwise."""
        interpreter = self._interpreter
        signatures = interpreter.get_signature_list()
        plain = (
            {item["name"]: item["index"] for item in interpreter.get_input_details()},
            {item["name"]: item["index"] for item in interpreter.get_output_details()},
        )
        if len(signatures) != 1:
            return plain
        runner = interpreter.get_signature_runner(next(iter(signatures)))
        named = (
            {name: item["index"] for name, item in runner.get_input_details().items()},
            {name: item["index"] for name, item in runner.get_output_details().items()},
        )
        same = set(named[0].values()) == set(plain[0].values()) and set(named[1].values()) == set(plain[1].values())
        return named if same else plain

    @property
    def runtime(self) -> str:
        """``litert``."""
        return "litert"

    @property
    def runtime_version(self) -> str:
        """The version of LiteRT."""
        return self._version

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run each sample in turn; see :meth:`edgekit.runtime.session.Session.run`."""
        check_feeds(feeds, self._inputs, name=self._name)
        if not self._is_batched:
            return self._run_once(feeds)
        lengths = {len(value) for value in feeds.values()}
        if len(lengths) != 1 or 0 in lengths:
            found = ", ".join(f"{name} has {len(value)}" for name, value in feeds.items())
            message = f"{self._name}: every input needs the same number of samples, at least one: {found}."
            raise DataError("data.shape", message, hint="Axis 0 is the sample.")
        parts = [self._run_once({name: value[i : i + 1] for name, value in feeds.items()}) for i in range(lengths.pop())]
        return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in self._outputs}

    def _run_once(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            for name, index in self._input_index.items():
                self._interpreter.set_tensor(index, np.ascontiguousarray(feeds[name]))
            self._interpreter.invoke()
            return {name: self._interpreter.get_tensor(index) for name, index in self._output_index.items()}
        except (RuntimeError, ValueError) as error:
            raise ArtifactError("model.run_failed", f"{self._name}: LiteRT failed: {error}.") from error

    def close(self) -> None:
        """Free the model."""
        del self._interpreter


def load(path: Path, options: SessionOptions) -> LiteRTSession:
    """Load a ``.tflite`` file; see :class:`edgekit.runtime.session.SessionLoader`."""
    return LiteRTSession(path, options)
