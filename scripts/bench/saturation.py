#!/usr/bin/env python3
"""Compare what edgekit predicts for processors without a dot-product instruction with what such a processor answers.

    python scripts/bench/saturation.py [FOLDER ...] [--quantized FILE] [--samples 100] [--cpu Haswell-noTSX]

A FOLDER holds model.onnx, calibration.npz and evaluation.npz, as sample_models/fashion-mnist and the folders of
scripts/bench/ptq/zoo.py do; its model is quantized by onnxruntime's own quantizer (uint8 activations, int8 weights per channel
over the full range), unless ``--quantized`` gives a QDQ model for the one FOLDER. Without a FOLDER: the sample model and an
inverted-residual network of random weights. Single layers of every kind come first: there the prediction has to be exact.

The processor is emulated by ``qemu-x86_64`` (Debian package qemu-user): Haswell has AVX2 and no VNNI. Any x86-64 host will do;
``native`` is this host. SQNR is in dB against the float32 model's outputs on this host; top-1 where there are labels.
"""

# ruff: noqa: PLC0415  the part that runs in the emulator imports numpy and onnxruntime only
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[2]
CALIBRATED = 64
BATCH_SIZE = 10


def answer(model: Path, feeds: Path, results: Path) -> None:
    """Run a model on samples, fully optimized, on the processor that runs this."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with np.load(feeds) as file:
        arrays = {item.name: file[item.name] for item in session.get_inputs()}
    first = session.get_inputs()[0].shape[:1]
    size = first[0] if first and isinstance(first[0], int) else BATCH_SIZE
    count = len(next(iter(arrays.values())))
    parts = [session.run(None, {name: a[i : i + size] for name, a in arrays.items()}) for i in range(0, count, size)]
    names = [item.name for item in session.get_outputs()]
    np.savez(results, **{name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)})


def run(model: Path, feeds: dict[str, Array], folder: Path, emulator: list[str]) -> dict[str, Array]:
    """Outputs by name of a process of its own, in the emulator or, with none, on this host."""
    given, results = folder / "feeds.npz", folder / "results.npz"
    np.savez(given, **feeds)  # type: ignore[arg-type]
    command = [*emulator, sys.executable, __file__, "--answer", str(model), str(given), str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    with np.load(results) as file:
        return {name: file[name] for name in file.files}


# --- models ------------------------------------------------------------------------------------------------------------------


def quantize(folder: Path, feeds: dict[str, Array], result: Path) -> None:
    """Onnxruntime's quantizer with its range not reduced: the case that saturates."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = iter([{name: a[i : i + 1] for name, a in feeds.items()} for i in range(CALIBRATED)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self._samples, None)

    prepared = result.with_suffix(".prepared.onnx")
    quant_pre_process(str(folder / "model.onnx"), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(result),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=False,
    )


def write_inverted_residual(folder: Path, size: int = 32, seed: int = 0) -> None:
    """Six inverted-residual blocks of random weights (Sandler et al., CVPR 2018, scaled down) and smooth random pictures."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(seed)
    weights = [numpy_helper.from_array(np.float32(value), name) for value, name in ((0, "zero"), (6, "six"))]
    nodes: list[Any] = []

    def conv(source: str, shape: tuple[int, ...], *, is_clipped: bool = True, **attributes: Any) -> str:
        name = f"conv{len(nodes)}"
        gain = 2.0 if is_clipped else 1.0
        values = random.laplace(size=shape) * np.sqrt(gain / np.prod(shape[1:]) / 2)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.w"))
        weights.append(numpy_helper.from_array(random.normal(0, 0.3, shape[0]).astype(np.float32), f"{name}.b"))
        pads = [shape[-1] // 2] * 4
        nodes.append(helper.make_node("Conv", [source, f"{name}.w", f"{name}.b"], [name], name=name, pads=pads, **attributes))
        if is_clipped:
            nodes.append(helper.make_node("Clip", [name, "zero", "six"], [f"{name}.clip"], name=f"{name}.clip"))
        return f"{name}.clip" if is_clipped else name

    last, channels = conv("x", (16, 3, 3, 3), strides=[2, 2]), 16
    for wanted, stride in ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (48, 1)):
        inner = conv(last, (6 * channels, channels, 1, 1))
        inner = conv(inner, (6 * channels, 1, 3, 3), group=6 * channels, strides=[stride, stride])
        block = conv(inner, (wanted, 6 * channels, 1, 1), is_clipped=False)
        if wanted == channels and stride == 1:
            nodes.append(helper.make_node("Add", [last, block], [f"{block}.sum"], name=f"{block}.sum"))
            block = f"{block}.sum"
        last, channels = block, wanted
    last = conv(last, (128, channels, 1, 1))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    weights.append(numpy_helper.from_array((random.normal(size=(10, 128)) / 8).astype(np.float32), "head.w"))
    nodes.append(helper.make_node("Gemm", ["flat", "head.w"], ["y"], name="head", transB=1))
    x = helper.make_tensor_value_info("x", 1, ["batch", 3, size, size])
    y = helper.make_tensor_value_info("y", 1, ["batch", 10])
    graph = helper.make_graph(nodes, "inverted-residual", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    for name, count in (("calibration", CALIBRATED), ("evaluation", 400)):
        np.savez(folder / f"{name}.npz", x=pictures(random, count, size))  # type: ignore[arg-type]


def pictures(random: np.random.Generator, count: int, size: int) -> Array:
    """Random float32 [count, 3, size, size] whose power falls with the square of the frequency, as that of photographs does."""
    along = np.fft.fftfreq(size) * size
    radius = np.maximum(1.0, np.hypot(along[:, None], along))
    spectrum = np.fft.fft2(random.normal(size=(count, 3, size, size))) / radius
    values = np.fft.ifft2(spectrum).real
    return (values / values.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


LAYERS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ("Conv", (2, 4, 9, 9), (16, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    ("Conv", (2, 3, 9, 9), (16, 3, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", (2, 5, 11, 11), (7, 5, 3, 3), {"dilations": [2, 1]}),
    ("Conv", (2, 1, 9, 9), (16, 1, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", (2, 8, 9, 9), (16, 8, 2, 2), {"auto_pad": "SAME_LOWER"}),
    ("Conv", (2, 63, 6, 6), (24, 63, 1, 1), {}),
    ("Conv", (2, 12, 9, 9), (16, 3, 3, 3), {"group": 4}),
    ("Conv", (2, 16, 9, 9), (32, 1, 3, 3), {"group": 16}),
    ("Conv", (2, 16, 9, 9), (16, 1, 3, 3), {"group": 16}),
    ("Conv", (2, 5, 9, 9), (5, 1, 3, 3), {"group": 5}),
    ("Conv", (2, 6, 30), (16, 6, 5), {"pads": [2, 2]}),
    ("Conv", (2, 3, 5, 6, 7), (8, 3, 3, 3, 3), {"pads": [1] * 6}),
    ("MatMul", (2, 7, 33), (33, 20), {}),
    ("MatMul", (1, 1000), (1000, 20), {}),
    ("Gemm", (5, 40), (40, 20), {"alpha": 0.5}),
    ("Gemm", (5, 41), (20, 41), {"transB": 1}),
)


def single_layers(folder: Path, seed: int = 0) -> Iterator[tuple[str, Path, dict[str, Array]]]:
    """A QDQ model of each layer, with weights and activations that saturate, and its input."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(seed)
    for number, (kind, x_shape, w_shape, attributes) in enumerate(LAYERS):
        axis = 0 if kind == "Conv" or attributes.get("transB") else 1
        stored = np.clip(np.round(random.normal(size=w_shape) * 70), -127, 127).astype(np.int8)
        unit = random.uniform(0.5, 1.5, w_shape[axis]) / 60 / np.sqrt(stored.size / w_shape[axis])
        values = {"xs": np.float32(0.02), "xz": np.uint8(37), "w": stored, "ws": unit.astype(np.float32)}
        values |= {"wz": np.zeros(w_shape[axis], np.int8), "ys": np.float32(0.05), "yz": np.uint8(128)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
            helper.make_node(kind, ["xd", "wd"], ["r"], name="layer", **attributes),
            helper.make_node("QuantizeLinear", ["r", "ys", "yz"], ["rq"]),
            helper.make_node("DequantizeLinear", ["rq", "ys", "yz"], ["y"]),
        ]
        x, y = helper.make_tensor_value_info("x", 1, ["batch", *x_shape[1:]]), helper.make_tensor_value_info("y", 1, None)
        constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
        graph = helper.make_graph(nodes, "layer", [x], [y], constants)
        path = folder / f"layer{number}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        feeds = {"x": np.minimum(np.abs(random.normal(size=x_shape) * 2) - 0.5, 4.4).astype(np.float32)}
        text = " ".join(f"{name}={value}" for name, value in attributes.items())
        yield f"{kind} {'x'.join(map(str, w_shape))} {text}", path, feeds


# --- comparisons -------------------------------------------------------------------------------------------------------------


def sqnr(reference: dict[str, Array], outputs: dict[str, Array]) -> float:
    """Of the worst floating-point output, in dB, at most 200."""
    ratios = [
        np.square(outputs[name].astype(np.float64) - value).sum() / max(1e-20, np.square(value, dtype=np.float64).sum())
        for name, value in reference.items()
        if value.dtype.kind == "f"
    ]
    return float(-10 * np.log10(max(1e-20, *ratios, 0)))


def top1(outputs: dict[str, Array], labels: Array | None) -> float:
    """In percent; not a number without labels of classes."""
    first = next(iter(outputs.values()))
    if labels is None or first.ndim != 2:
        return float("nan")
    return float(100 * (first.argmax(-1) == labels[: len(first)]).mean())


def compare_layers(folder: Path, emulator: list[str]) -> list[list[str]]:
    """A row for each single layer; ``off`` must be 0."""
    from edgekit.compiler.graph import read_onnx
    from edgekit.compiler.saturation import count_saturation, simulate_saturation
    from edgekit.dataset.data import make_dataset

    rows = []
    for name, path, feeds in single_layers(folder):
        model, data = read_onnx(path), make_dataset(feeds, source=name)
        counts = count_saturation(model, data)
        predicted = simulate_saturation(model, data, samples=len(data))["y"]
        native, emulated = (run(path, feeds, folder, how)["y"] for how in ([], emulator))
        rows.append([name, str(sum(item.overflowing for item in counts))])
        rows[-1] += [str(int((np.abs(values - emulated) > 0.01).sum())) for values in (native, predicted)]
    return rows


def compare_model(
    source: Path, quantized: Path | None, count: int, emulator: list[str], folder: Path
) -> tuple[list[str], list[list[str]]]:
    """The row of one model, and the rows of its saturating layers."""
    from edgekit.compiler.graph import read_onnx
    from edgekit.compiler.saturation import count_saturation, simulate_saturation
    from edgekit.dataset.data import make_dataset, spread_indices

    names = {item.name for item in read_onnx(source / "model.onnx").graph.input}
    with np.load(source / "calibration.npz", allow_pickle=False) as file:
        calibration = {name: file[name] for name in file.files if name in names}
    with np.load(source / "evaluation.npz", allow_pickle=False) as file:
        chosen = spread_indices(len(file[next(iter(names))]), count)
        feeds = {name: file[name][chosen] for name in names}
        labels = file["labels"][chosen] if "labels" in file.files else None
    if quantized is None:
        quantized = folder / f"{source.name}.onnx"
        quantize(source, calibration, quantized)
    model = read_onnx(quantized)
    counts = [item for item in count_saturation(model, make_dataset(calibration, source="")) if item.overflowing]
    predicted = simulate_saturation(model, make_dataset(feeds, source=""), samples=count)
    reference = run(source / "model.onnx", feeds, folder, [])
    native, emulated = (run(quantized, feeds, folder, how) for how in ([], emulator))
    row = [source.name, str(len(counts)), f"{top1(reference, labels):.1f}"]
    row += [f"{top1(outputs, labels):.1f}" for outputs in (native, predicted, emulated)]
    row += [f"{sqnr(reference, outputs):.2f}" for outputs in (native, predicted, emulated)]
    row += [f"{sqnr(emulated, outputs):.1f}" for outputs in (native, predicted)]
    layers = [[f"{source.name}: {item.layer}", f"{item.overflowing / item.pairs:.2e}", str(item.worst)] for item in counts]
    return row, layers


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Predicted against emulated saturation.")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--quantized", type=Path, help="a QDQ model of the one folder")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--emulator", default="qemu-x86_64")
    parser.add_argument("--cpu", default="Haswell-noTSX")
    parser.add_argument("--answer", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(*arguments.answer)
        return
    from edgekit.cli.console import table

    emulator = [arguments.emulator, "-cpu", arguments.cpu]
    with tempfile.TemporaryDirectory(prefix="edgekit-saturation-") as name:
        folder = Path(name)
        rows = compare_layers(folder, emulator)
        print(table(["layer", "overflows", "native off", "predicted off"], rows, right=[1, 2, 3]), flush=True)
        folders = arguments.folders
        if not folders:
            (folder / "inverted-residual").mkdir()
            write_inverted_residual(folder / "inverted-residual")
            folders = [ROOT / "sample_models" / "fashion-mnist", folder / "inverted-residual"]
        done = [compare_model(item, arguments.quantized, arguments.samples, emulator, folder) for item in folders]
    headers = ["model", "layers", "top-1 fp32", "native", "predicted", "emulated", "SQNR native", "predicted", "emulated"]
    print(table([*headers, "native : emulated dB", "predicted : emulated dB"], [row for row, _ in done], right=range(1, 11)))
    print(table(["saturating layer", "share of pairs", "worst"], [row for _, rows in done for row in rows], right=[1, 2]))


if __name__ == "__main__":
    main()
