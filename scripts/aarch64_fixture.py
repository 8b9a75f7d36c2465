#!/usr/bin/env python3
"""Make tests/agent/fixtures/aarch64.json: what scripts/aarch64_core.py needs and a device cannot make itself.

A small int8 model (QDQ: convolution-free, one quantized matrix product) in a signed bundle, a signed desired state, a birth.
The key is thrown away.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.golden import tensor_data
from edgekit.bundle.writer import write_bundle
from edgekit.runtime.registry import open_session
from edgekit.schema.base import encode_msgpack
from edgekit.schema.desired import DesiredModel, DesiredState
from edgekit.schema.digest import digest_bytes
from edgekit.schema.manifest import GoldenSample, GoldenSet
from edgekit.schema.message import Birth, MetricSpec
from edgekit.telemetry.codec import encode
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.signer import generate_signer
from tests.agent.world import build_manifest

FIXTURE = ROOT / "tests" / "agent" / "fixtures" / "aarch64.json"


def int8_model() -> bytes:
    """One quantized matrix product: x [batch, 4] → y [batch, 3]."""
    weights = np.random.default_rng(7).integers(-127, 128, size=(4, 3)).astype(np.int8)
    scales = {"x_scale": 1 / 127, "w_scale": 0.01, "y_scale": 0.05}
    initializers = [numpy_helper.from_array(np.float32(value), name) for name, value in scales.items()]
    initializers += [numpy_helper.from_array(np.int8(0), "zero"), numpy_helper.from_array(weights, "w")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "zero"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "y_scale", "zero"], ["hq"]),
        helper.make_node("DequantizeLinear", ["hq", "y_scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def main() -> None:
    """Write the fixture."""
    signer, model = generate_signer(), int8_model()
    now = datetime(2026, 11, 1, tzinfo=UTC)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(model)
        session = open_session(path)
        samples = []
        for seed in range(4):
            x = np.random.default_rng(seed).uniform(-1, 1, size=(1, 4)).astype(np.float32)
            samples.append(GoldenSample(inputs={"x": tensor_data(x)}, outputs={"y": tensor_data(session.run({"x": x})["y"])}))
        # One step of the output's quantization: kernels of other processors may round the other way.
        golden = encode_msgpack(GoldenSet(samples=tuple(samples), atol=0.0501, rtol=0.0, tolerance_reason="one step"))
        blobs = {(0, "model"): model, (0, "golden"): golden}
        manifest = build_manifest(version="1.0", blobs=blobs)
        bundle = Path(folder) / "m.edgekit"
        write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=signer, out=bundle)
        packed = bundle.read_bytes()
    desired = DesiredState(
        device="cam",
        seq=7,
        issued_at=now - timedelta(hours=1),
        expires_at=now + timedelta(days=1),
        models={"m": DesiredModel(counter=1, manifest=digest_bytes(b"m"))},
    )
    birth = Birth(
        boot=2**62 + 3, seq=1, time_ms=1, metrics=(MetricSpec(name="x"),), isa=("neon",), ram_mb=0.5, labels={"a": "ä"}
    )
    request = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.1, -0.2, 0.3, 0.4]}]}
    record = {
        "now": now.isoformat(),
        "key": signer.public_key.to_pem(),
        "bundle": base64.b64encode(packed).decode(),
        "desired": sign_desired(desired, [signer]).decode(),
        "birth": base64.b64encode(encode(birth)).decode(),
        "request": json.dumps(request),
    }
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
