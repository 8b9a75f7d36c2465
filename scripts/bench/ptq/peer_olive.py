"""Olive's static quantization of an ONNX model; runs in an environment of its own, without edgekit.

default     the pass OnnxStaticQuantization with its default settings

    python peer_olive.py --model model.onnx --calibration calibration.npz --out quantized.onnx
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from olive.data.config import DataConfig
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxStaticQuantization
from peers import PeerArguments, input_names, peer_arguments, samples

VARIANTS = ("default",)


class Samples:
    """The calibration samples, each with a label that nothing reads."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        if index >= len(self._rows):
            raise IndexError(index)
        return {name: value[0] for name, value in self._rows[index].items()}, 0


def quantize(arguments: PeerArguments) -> None:
    """Write the quantized model."""
    rows = samples(arguments.calibration, input_names(onnx.load(arguments.model)))
    Registry.register_dataset("calibration_samples")(lambda **_settings: Samples(rows))
    data = DataConfig(
        name="calibration",
        load_dataset_config={"type": "calibration_samples"},
        pre_process_data_config={"type": "skip_pre_process"},
        post_process_data_config={"type": "skip_post_process"},
        dataloader_config={"type": "default_dataloader", "batch_size": 1},
    )
    quantizer = create_pass_from_dict(OnnxStaticQuantization, {"data_config": data}, disable_search=True)
    with tempfile.TemporaryDirectory() as folder:
        result = quantizer.run(ONNXModelHandler(model_path=str(arguments.model)), str(Path(folder) / "model.onnx"))
        shutil.copy(result.model_path, arguments.out)


if __name__ == "__main__":
    quantize(peer_arguments(sys.argv[1:], VARIANTS))
