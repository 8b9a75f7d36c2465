"""NNCF's quantization of an ONNX model; runs in an environment of its own, without edgekit.

default     nncf.quantize with its defaults; the transformer preset where the model is one
accuracy    nncf.quantize_with_accuracy_control: a drop of top-1 of at most 0.01 on the labelled calibration samples

    python peer_nncf.py --model model.onnx --calibration calibration.npz --out quantized.onnx --variant default
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import nncf
import numpy as np
import onnx
import onnxruntime
from peers import LABELS, PeerArguments, input_names, peer_arguments, samples

VARIANTS = ("default", "accuracy")


def quantize(arguments: PeerArguments) -> None:
    """Write the quantized model."""
    model = onnx.load(arguments.model)
    names = input_names(model)
    kind = nncf.ModelType.TRANSFORMER if arguments.is_transformer else None
    if arguments.variant == "default":
        quantized = nncf.quantize(model, nncf.Dataset(samples(arguments.calibration, names)), model_type=kind)
    else:
        rows = samples(arguments.calibration, names, with_labels=True)
        data = nncf.Dataset(rows, lambda row: {name: row[name] for name in names})
        quantized = nncf.quantize_with_accuracy_control(model, data, nncf.Dataset(rows), _top1, model_type=kind)
    onnx.save(quantized, arguments.out)


def _top1(model: onnx.ModelProto | object, rows: Iterable[dict[str, np.ndarray]]) -> tuple[float, list[float]]:
    """Top-1 accuracy, and whether each sample was right."""
    session = model
    if isinstance(model, onnx.ModelProto):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    hits = []
    for row in rows:
        feeds = {name: value for name, value in row.items() if name != LABELS}
        answer = session.run(None, feeds)[0] if hasattr(session, "run") else next(iter(session(feeds).values()))
        hits.append(float(np.argmax(answer) == row[LABELS]))
    return float(np.mean(hits)), hits


if __name__ == "__main__":
    quantize(peer_arguments(sys.argv[1:], VARIANTS))
