"""Small real releases for tests: candidates with a real ONNX model, bundles, repositories."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edgekit.bundle.golden import tensor_data
from edgekit.bundle.writer import write_bundle
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import encode_json, encode_msgpack
from edgekit.schema.candidate import Candidate, SourceModel, Verdict
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.digest import digest_bytes, digest_file
from edgekit.schema.manifest import BlobRef, GoldenSample, GoldenSet, Manifest, Requires, Variant
from edgekit.schema.tensor import TensorSpec
from edgekit.trust.signer import Signer

BORN = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
CONTRACT = Contract(
    inputs=(InputSpec(name="x", dtype="float32", shape=("batch", 4), minimum=-1.0, maximum=1.0),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    task="classification",
    labels=("a", "b", "c"),
)


def candidate_record(model_path: str, model: bytes, *, precision: str = "fp32", contract: Contract = CONTRACT) -> Candidate:
    artifact = ModelArtifact(
        path=model_path,
        digest=digest_bytes(model),
        size_bytes=len(model),
        format="onnx",
        inputs=tuple(TensorSpec(name=s.name, dtype=s.dtype, shape=s.shape) for s in contract.inputs),
        outputs=contract.outputs,
        precision=precision,
    )
    return Candidate(
        name=precision,
        target="host",
        target_digest=digest_bytes(b"target"),
        source=SourceModel(spec="m.onnx", kind="onnx", digest=digest_bytes(b"source"), size_bytes=6),
        contract=contract,
        verdict=Verdict(status="chosen", is_budget_met=True, reason="the fastest"),
        seed=0,
        created_at=BORN,
        edgekit_version="0.1.0",
        artifact=artifact,
    )


def linear_model(seed: int = 0) -> bytes:
    """y = x W + b, three classes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    weights = numpy_helper.from_array(random.normal(size=(4, 3)).astype(np.float32), "w")
    bias = numpy_helper.from_array(random.normal(size=3).astype(np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        initializer=[weights, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def candidate_folder(folder: Path, *, seed: int = 0) -> Path:
    """An output folder of ``edgekit optimize`` with a real model."""
    folder.mkdir(parents=True)
    model = linear_model(seed)
    (folder / "model.onnx").write_bytes(model)
    (folder / "candidate.json").write_bytes(encode_json(candidate_record("model.onnx", model)))
    (folder / "report.html").write_text("<html>report</html>")
    (folder / "report.json").write_text("{}")
    return folder


def tiny_bundle(
    path: Path, signer: Signer | list[Signer], *, name: str = "kws", version: str = "1.0.0", model: bytes = b"weights" * 50
) -> Path:
    """A bundle whose model is any bytes: for everything that does not run it."""
    sample = GoldenSample(
        inputs={"x": tensor_data(np.zeros((1, 4), np.float32))}, outputs={"y": tensor_data(np.zeros((1, 3), np.float32))}
    )
    golden = encode_msgpack(GoldenSet(samples=(sample,), atol=0.1, rtol=0.0, tolerance_reason="test"))
    blobs = {digest_bytes(model): model, digest_bytes(golden): golden}
    manifest = Manifest(
        name=name,
        version=version,
        created_at=BORN,
        target="host",
        contract=CONTRACT,
        variants=(
            Variant(
                name="fp32",
                format="onnx",
                precision="fp32",
                model=digest_bytes(model),
                golden=digest_bytes(golden),
                requires=Requires(runtime="onnxruntime"),
            ),
        ),
        blobs=(
            BlobRef(path="model.onnx", role="model", digest=digest_bytes(model), size_bytes=len(model)),
            BlobRef(path="golden.msgpack", role="golden", digest=digest_bytes(golden), size_bytes=len(golden)),
        ),
        candidate=candidate_record("model.onnx", model),
        edgekit_version="0.1.0",
    )
    return write_bundle(manifest, blobs, signer=signer, out=path)


def tree_digests(folder: Path) -> dict[str, str]:
    """Digest by relative path, to see that nothing changed."""
    return {str(p.relative_to(folder)): digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
