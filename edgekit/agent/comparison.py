"""How the shadow slot's answer compares with the one that was given: the same class, or close enough."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.agent.guard import InputGuard
from edgekit.agent.link import Compare, Compared, Model
from edgekit.bundle.golden import array_of

Array = NDArray[Any]


def compare(session: Any, model: Model, asked: Compare) -> Compared:
    """Run the model on a copy of a live input and compare.

    A classifier agrees when its largest class is the same in every row of its first output; another model when no output is
    further from the given one than ``tolerance``, relative to the largest value.
    """
    feeds = {name: array_of(tensor) for name, tensor in asked.inputs.items()}
    given = {name: array_of(tensor) for name, tensor in asked.outputs.items()}
    started = time.perf_counter()
    try:
        outputs = session.run(feeds)
    except Exception as failure:  # noqa: BLE001 - whatever it is, the candidate does not answer what the other one answers
        return Compared(is_agreed=False, error=np.inf, confidence_delta=0.0, inference_ms=0.0, why=str(failure)[:400])
    elapsed = (time.perf_counter() - started) * 1000.0
    if why := _mismatch(outputs, given):
        return Compared(is_agreed=False, error=np.inf, confidence_delta=0.0, inference_ms=elapsed, why=why)
    contract = model.manifest.contract
    error = max((_relative_error(outputs[name], given[name]) for name in given), default=0.0)
    is_classifier = contract.task == "classification" and contract.outputs
    if is_classifier and contract.outputs[0].name in given:
        name = contract.outputs[0].name
        is_agreed = bool(np.isfinite(outputs[name]).all() and (outputs[name].argmax(-1) == given[name].argmax(-1)).all())
    else:
        is_agreed = error <= asked.tolerance
    guard = InputGuard(contract)
    delta = _mean(*guard.confidence(outputs)) - _mean(*guard.confidence(given))
    return Compared(is_agreed=is_agreed, error=error, confidence_delta=delta, inference_ms=elapsed)


def _mismatch(outputs: Mapping[str, Array], given: Mapping[str, Array]) -> str:
    for name, array in given.items():
        if name not in outputs:
            return f"it has no output {name}"
        if outputs[name].shape != array.shape:
            return f"{name} has shape {list(outputs[name].shape)}, the model that serves answers {list(array.shape)}"
    return ""


def _relative_error(actual: Array, expected: Array) -> float:
    if not expected.size:
        return 0.0
    left, right = actual.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(left).all():
        return float(np.inf)
    return float(np.abs(left - right).max() / max(float(np.abs(right).max()), 1e-12))


def _mean(total: float, count: int) -> float:
    return total / count if count else 0.0
