#!/usr/bin/env python
"""Deltas between real models, beside zstd, hdiffpatch and bsdiff4: bytes, seconds and memory.

    python scripts/bench/delta.py --cache DIR            the sample model's pairs (the first run trains one more epoch)
    python scripts/bench/delta.py --cache DIR --tflite   and the fine-tuned pair in TFLite
    python scripts/bench/delta.py --cache DIR --large    and a 20 MB model, where bsdiff4 and hdiffpatch take minutes

The pairs: the sample model, trained one more epoch at a low rate and quantized again (with scales calibrated anew, and with the
scales of before); one layer changed; initializers in another order; 10 % of the inner channels pruned; float32. The ratio is to
the smallest of zstd (level 19, the old file as prefix), hdiffpatch (lzma2) and bsdiff4. What is published is the smaller of
``tsub1`` and hdiffpatch (column ``ours``).
"""

# ruff: noqa: PLC0415  torch, onnx and the rivals are loaded by what needs them only
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE = ROOT / "sample_models" / "fashion-mnist"
sys.path.insert(0, str(SAMPLE))

from edgekit.bundle.delta.apply import apply_delta
from edgekit.bundle.delta.make import make_delta, subtract
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import DeltaRef

EPOCH_RATE = 0.002


@dataclass(frozen=True)
class Pair:
    """Two files, and what is between them."""

    name: str
    old: Path
    new: Path
    note: str = ""
    is_large: bool = False


# --- the pairs


def train_one_more_epoch(out: Path, images: Path) -> None:
    """The sample model's weights, trained on."""
    import model as sample
    import torch
    import train

    torch.manual_seed(1)
    net = sample.create()
    net.load_state_dict(torch.load(SAMPLE / "weights.pt", weights_only=True))
    pixels, labels = train.load_images(images, "train")
    x, y = torch.from_numpy(train.as_input(pixels)), torch.from_numpy(labels.astype("int64"))
    optimizer = torch.optim.SGD(net.parameters(), lr=EPOCH_RATE, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(x), generator=generator)
    net.train()
    for start in range(0, len(x), 128):
        chosen = order[start : start + 128]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(train.augment(x[chosen], generator)), y[chosen]).backward()
        optimizer.step()
    torch.save(net.state_dict(), out)


def export(weights: Path, out: Path) -> None:
    """The sample model with these weights, in ONNX."""
    import model as sample
    import torch
    import train

    net = sample.create()
    net.load_state_dict(torch.load(weights, weights_only=True))
    train.export_onnx(net.eval(), out)


def quantize_to_tflite(weights: Path, out: Path) -> Path:
    """``edgekit optimize``'s int8 model for a micro-controller."""
    command = [sys.executable, "-m", "edgekit", "optimize", f"{SAMPLE / 'model.py'}:create", "--weights", str(weights)]
    command += ["--target", "cortex-m7-tflm", "--effort", "fast", "--quiet", "--out", str(out)]
    command += ["--data", str(SAMPLE / "calibration.npz"), "--eval", str(SAMPLE / "evaluation.npz")]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return next((out / ".work" / "steps").glob("*/int8-*.tflite"))


def quantize(model: Path, out: Path) -> Path:
    """``edgekit optimize``'s int8 candidate, per channel."""
    command = [sys.executable, "-m", "edgekit", "optimize", str(model), "--target", "host", "--effort", "fast", "--quiet"]
    command += ["--data", str(SAMPLE / "calibration.npz"), "--eval", str(SAMPLE / "evaluation.npz"), "--out", str(out)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return next((out / "candidates" / "int8-per-channel").glob("*.onnx"))


def requantize_at_old_scales(old: Path, floats: Path, out: Path) -> None:
    """New weights in the old model, at the old model's scales: what ``optimize --previous`` aims at."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(old)
    fresh = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(floats).graph.initializer}
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix("_quantized")
        scale = kept.get(f"{name}_scale", kept.get(f"{tensor.name}_scale"))
        if name == tensor.name or name not in fresh or scale is None:
            continue
        shape = (-1,) + (1,) * (fresh[name].ndim - 1)
        low, high = (-127, 127) if kept[tensor.name].dtype == np.int8 else (-(2**31), 2**31 - 1)
        values = np.clip(np.rint(fresh[name] / scale.reshape(shape)), low, high).astype(kept[tensor.name].dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    out.write_bytes(model.SerializeToString())


def change_one_layer(old: Path, new: Path, out: Path) -> None:
    """The old model with the weights of one layer of the new one."""
    import onnx

    model = onnx.load(old)
    fresh = {tensor.name: tensor for tensor in onnx.load(new).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name == "stage2.conv2.weight_quantized":
            tensor.CopyFrom(fresh[tensor.name])
    out.write_bytes(model.SerializeToString())


def reorder(old: Path, out: Path) -> None:
    """The same initializers in another order."""
    import onnx

    model = onnx.load(old)
    order = np.random.default_rng(0).permutation(len(model.graph.initializer))
    tensors = [model.graph.initializer[int(i)] for i in order]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    out.write_bytes(model.SerializeToString())


def prune(old: Path, out: Path, share: float = 0.1) -> None:
    """Every tenth channel between the two convolutions of each block taken out."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(old)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        for stage in ("stage1", "stage2", "stage3"):
            first = tensor.name.startswith(f"{stage}.conv1.") and values.ndim >= 1
            second = tensor.name == f"{stage}.conv2.weight_quantized"
            if not (first or second):
                continue
            axis = 1 if second else 0
            count = values.shape[axis]
            keep = np.sort(np.random.default_rng(7).permutation(count)[: round(count * (1 - share))])
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.take(keep, axis=axis)), tensor.name))
    del model.graph.value_info[:]
    out.write_bytes(model.SerializeToString())


def large_model(seed: int, noise: float, out: Path) -> None:
    """20 layers of 1024 x 1024 in int8, with weights that drift by a share of their spread."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    base, drift = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    nodes, tensors, at = [], [], "x"
    for i in range(20):
        weight = base.standard_t(4, size=(1024, 1024)).astype(np.float32)
        weight = weight + (noise * weight.std() * drift.normal(size=weight.shape)).astype(np.float32)
        scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
        quantized = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        tensors += [numpy_helper.from_array(quantized, f"w{i}"), numpy_helper.from_array(scale, f"s{i}")]
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=1))
        nodes.append(helper.make_node("MatMul", [at, f"d{i}"], [f"y{i}"]))
        at = f"y{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1024]) for name in ("x", at)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    out.write_bytes(onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


def top1(model: Path) -> float:
    """Accuracy on the evaluation images."""
    import onnxruntime

    with np.load(SAMPLE / "evaluation.npz") as data:
        labels, images = data["labels"], next(data[name] for name in data.files if name != "labels")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    answers = session.run(None, {session.get_inputs()[0].name: images})[0]
    return float((answers.argmax(1) == labels).mean())


def make_pairs(cache: Path, images: Path, *, is_large: bool, has_tflite: bool) -> list[Pair]:
    """Make what is not in the cache yet."""
    cache.mkdir(parents=True, exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path = cache / name
        if not path.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            part = path.with_suffix(".part")
            make(part)
            part.rename(path)
        return path

    weights = once("tuned.pt", lambda out: train_one_more_epoch(out, images))
    tuned = once("tuned.onnx", lambda out: export(weights, out))
    old = once("int8.onnx", lambda out: shutil.copy(quantize(SAMPLE / "model.onnx", cache / "run-old"), out))
    new = once("int8-tuned.onnx", lambda out: shutil.copy(quantize(tuned, cache / "run-tuned"), out))
    kept = once("int8-tuned-kept.onnx", lambda out: requantize_at_old_scales(old, tuned, out))
    notes = {path: f"top-1 {top1(path):.4f}" for path in (old, new, kept)}
    pairs = [
        Pair("fine-tuned", old, new, f"{notes[old]} → {notes[new]}"),
        Pair("fine-tuned, scales kept", old, kept, notes[kept]),
        Pair("one layer changed", old, once("int8-layer.onnx", lambda out: change_one_layer(old, new, out))),
        Pair("re-ordered", old, once("int8-order.onnx", lambda out: reorder(old, out))),
        Pair("10 % pruned", old, once("int8-pruned.onnx", lambda out: prune(old, out))),
        Pair("fine-tuned, float32", SAMPLE / "model.onnx", tuned),
    ]
    if has_tflite:
        flat_old = once(
            "int8.tflite", lambda out: shutil.copy(quantize_to_tflite(SAMPLE / "weights.pt", cache / "flat-old"), out)
        )
        flat_new = once("int8-tuned.tflite", lambda out: shutil.copy(quantize_to_tflite(weights, cache / "flat-tuned"), out))
        pairs.append(Pair("fine-tuned, TFLite", flat_old, flat_new))
    if is_large:
        start = once("large.onnx", lambda out: large_model(0, 0.0, out))
        for noise in (0.001, 0.01, 0.05):
            end = once(f"large-{noise}.onnx", lambda out, noise=noise: large_model(0, noise, out))
            pairs.append(Pair(f"20 MB, noise {noise:g} sigma", start, end, is_large=True))
    return pairs


# --- measuring


def timed(work: Callable[[], bytes]) -> tuple[int, float]:
    """Size and seconds."""
    started = time.perf_counter()
    size = len(work())
    return size, time.perf_counter() - started


def rivals(old: bytes, new: bytes) -> dict[str, tuple[int, float]]:
    """The others."""
    import bsdiff4
    import hdiffpatch
    import zstandard

    def zstd() -> bytes:
        prefix = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        settings = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
        found: bytes = zstandard.ZstdCompressor(dict_data=prefix, compression_params=settings).compress(new)
        return found

    return {
        "zstd-19": timed(zstd),
        "hdiffpatch": timed(lambda: hdiffpatch.diff(old, new, compression="lzma2")),
        "bsdiff4": timed(lambda: bsdiff4.diff(old, new)),
    }


def apply_in_a_process(pair: Pair, content: bytes, codec: str) -> tuple[float, float]:
    """Seconds and the peak resident size, MB, of a fresh process that applies a delta."""
    folder = Path(f"/dev/shm/edgekit-delta-{time.time_ns()}")  # noqa: S108 - not to measure the disk
    folder.mkdir()
    try:
        (folder / "delta").write_bytes(content)
        command = [sys.executable, __file__, "--apply", str(pair.old), str(folder / "delta"), str(pair.new), codec]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        return found["seconds"], found["rss_mb"]
    finally:
        shutil.rmtree(folder)


def apply_here(old: Path, delta: Path, new: Path, codec: str) -> None:
    """What the fresh process does."""
    state = {"base": old, "target": new, "digest": delta}
    ref = DeltaRef(
        **{name: _digest(path) for name, path in state.items()},
        size_bytes=delta.stat().st_size,
        codec=codec,  # type: ignore[arg-type]
    )
    size = new.stat().st_size
    started = time.perf_counter()
    with delta.open("rb") as source, (delta.parent / "out").open("wb") as out:
        apply_delta(source, old, out, ref=ref, size_bytes=size)
    seconds = time.perf_counter() - started
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "rss_mb": peak / 1000}))


def _digest(path: Path) -> str:
    from edgekit.schema.digest import digest_file

    return digest_file(path)


def measure(pair: Pair, *, with_rivals: bool) -> dict[str, object]:
    """One line of the table."""
    old, new = pair.old.read_bytes(), pair.new.read_bytes()
    others = rivals(old, new) if with_rivals else {}
    size, seconds = timed(lambda: subtract(old, new))
    started = time.perf_counter()
    made = make_delta(pair.old, pair.new)
    chosen_seconds = time.perf_counter() - started
    content, codec = (made.content, made.codec) if made else (subtract(old, new), "tsub1")
    apply_seconds, rss = apply_in_a_process(pair, content, codec)
    best = min((found for found, _ in others.values()), default=0)
    return {
        "pair": pair.name,
        "full": len(new),
        **{f"{name}": found for name, (found, _) in others.items()},
        "tsub1": size,
        "ours": len(content),
        "codec": codec if made else f"{codec}, not worth it",
        "ratio": len(content) / best if best else None,
        "encode_s": seconds,
        "publish_s": chosen_seconds,
        "rival_encode_s": {name: found for name, (_, found) in others.items()},
        "apply_s": apply_seconds,
        "apply_rss_mb": rss,
        "note": pair.note,
        "digest": digest_bytes(content),
    }


def show(row: dict[str, object]) -> None:
    """One line, aligned."""
    ratio = f"{row['ratio']:.3f}" if row["ratio"] is not None else "-"
    sizes = " ".join(f"{row.get(name, 0):>10}" for name in ("full", "zstd-19", "hdiffpatch", "bsdiff4", "tsub1", "ours"))
    times = f"{row['encode_s']:7.2f} {row['publish_s']:7.2f} {row['apply_s']:7.2f} {row['apply_rss_mb']:6.0f}"
    print(f"{row['pair']:<26} {sizes} {ratio:>7} {times}  {row['codec']}  {row['note']}", flush=True)


def main() -> None:
    """The table."""
    if sys.argv[1:2] == ["--apply"]:
        apply_here(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where the models are kept")
    parser.add_argument(
        "--images", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="Fashion-MNIST, idx files"
    )
    parser.add_argument("--large", action="store_true", help="the 20 MB model, too")
    parser.add_argument("--tflite", action="store_true", help="the fine-tuned pair in TFLite, too (extra litert)")
    parser.add_argument("--no-rivals", action="store_true", help="only ours, for the 20 MB model")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    pairs = make_pairs(options.cache, options.images, is_large=options.large, has_tflite=options.tflite)
    head = " ".join(f"{name:>10}" for name in ("full", "zstd-19", "hdiffpatch", "bsdiff4", "tsub1", "ours"))
    print(f"{'pair':<26} {head} {'ratio':>7} {'tsub1 s':>7} {'make s':>7} {'apply s':>7} {'MB':>6}")
    rows = []
    for pair in pairs:
        rows.append(measure(pair, with_rivals=not (options.no_rivals and pair.is_large)))
        show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
