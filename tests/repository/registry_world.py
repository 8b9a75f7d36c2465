"""A gated repository with releases whose models really run, for everything that happens after publishing."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from releases import CONTRACT, candidate_record, linear_model

from edgekit.bundle.golden import tensor_data
from edgekit.bundle.writer import write_bundle
from edgekit.repository.ceremony import KeyPlan, init_repository
from edgekit.repository.measuring import Trial
from edgekit.repository.promotion import promote
from edgekit.repository.publishing import add_publisher, publish
from edgekit.repository.server import RepositoryServer
from edgekit.runtime.registry import open_session
from edgekit.schema.base import encode_json, encode_msgpack
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_bytes
from edgekit.schema.manifest import BlobRef, GoldenSample, GoldenSet, Manifest, Requires, Variant
from edgekit.schema.state import Floors
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer, load_signer, save_signer

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def answers(model: bytes, folder: Path, x: np.ndarray) -> np.ndarray:
    """What a model says."""
    path = folder / "asked.onnx"
    path.write_bytes(model)
    session = open_session(path)
    try:
        return session.run({"x": x})["y"]
    finally:
        session.close()


def slow_model(seed: int = 0, size: int = 700) -> bytes:
    """The linear model behind products of large matrices that add nothing: the same answers, many times slower."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_model_from_string(linear_model(seed))
    wide = numpy_helper.from_array(np.full((4, size), 1e-6, np.float32), "wide")
    square = numpy_helper.from_array(np.random.default_rng(1).normal(size=(size, size)).astype(np.float32) * 1e-6, "square")
    tall = numpy_helper.from_array(np.full((size, 3), 1e-6, np.float32), "tall")
    nodes = [helper.make_node("MatMul", ["x", "wide"], ["s0"])]
    nodes += [helper.make_node("MatMul", [f"s{i}", "square"], [f"s{i + 1}"]) for i in range(6)]
    nodes += [helper.make_node("MatMul", ["s6", "tall"], ["nothing"]), helper.make_node("Add", ["plain", "nothing"], ["y"])]
    old = list(model.graph.node)
    old[-1].output[0] = "plain"
    graph = helper.make_graph(
        [*old, *nodes],
        "slow",
        list(model.graph.input),
        list(model.graph.output),
        [*model.graph.initializer, wide, square, tall],
    )
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made)
    return made.SerializeToString()


class Registry:
    """A repository, its keys, a publisher, and what devices see of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repo, self.keys = folder, folder / "repo", folder / "keys"

    def make(self, *, is_gated: bool = True, now: datetime = NOW, **plan) -> None:
        self.folder.mkdir(exist_ok=True)
        init_repository(self.repo, keys_dir=self.keys, keys=KeyPlan(**plan), is_gated=is_gated, now=now)
        for name in ("publisher", "second"):
            signer = generate_signer()
            save_signer(signer, self.folder / f"{name}.pem")
            save_public_key(signer.public_key, self.folder / f"{name}.pub")
        add_publisher(self.repo, self.folder / "publisher.pub")

    def bundle(
        self, version="1.0.0", *, name="kws", model=None, contract=CONTRACT, golden=None, signers=("publisher",), requires=None
    ) -> Path:
        """A signed bundle with one real golden sample; ``golden`` replaces the expected answer."""
        model = model or linear_model()
        x = np.array([[0.5, -0.25, 1.0, -1.0]], np.float32)
        y = answers(model, self.folder, x) if golden is None else golden
        sample = GoldenSample(inputs={"x": tensor_data(x)}, outputs={"y": tensor_data(y)})
        tested = encode_msgpack(GoldenSet(samples=(sample,), atol=1e-3, rtol=0.0, tolerance_reason="test"))
        step = PassStep(
            name="optimize-graph",
            settings={"level": 2},
            parent=digest_bytes(b"source"),
            output=digest_bytes(model),
            seconds=0.1,
            versions={"onnx": "1.23.2"},
        )
        candidate = msgspec.structs.replace(candidate_record("model.onnx", model, contract=contract), lineage=(step,))
        card = f"# kws\n\nModel {digest_bytes(model).removeprefix('sha256:')}.\n".encode()
        second = encode_json(candidate)
        blobs = {digest_bytes(data): data for data in (model, tested, card, second)}
        variant = Variant(
            name="fp32",
            format="onnx",
            precision="fp32",
            model=digest_bytes(model),
            golden=digest_bytes(tested),
            requires=requires or Requires(runtime="onnxruntime"),
        )
        refs = (("model.onnx", "model", model), ("golden.msgpack", "golden", tested), ("card.md", "card", card))
        manifest = Manifest(
            name=name,
            version=version,
            created_at=NOW,
            target="host",
            contract=contract,
            variants=(variant, msgspec.structs.replace(variant, name="twin", candidate=digest_bytes(second))),
            blobs=tuple(
                BlobRef(path=path, role=role, digest=digest_bytes(data), size_bytes=len(data))
                for path, role, data in (*refs, ("twin/candidate.json", "candidate", second))
            ),
            candidate=candidate,
            edgekit_version="0.1.0",
        )
        keys = [load_signer(self.folder / f"{each}.pem") for each in signers]
        return write_bundle(manifest, blobs, signer=keys, out=self.folder / f"{name}-{version}.edgekit")

    def publish(self, version="1.0.0", *, channel="dev", now=NOW, again=False, role_keys=(), publishing=None, **bundle):
        path = self.bundle(version, **bundle)
        return publish(self.repo, path, channel=channel, now=now, is_again=again, role_keys=role_keys, **(publishing or {}))

    def samples(self, *, seed=0, count=200, is_labelled=True) -> str:
        """Data whose labels are what the linear model of that seed says."""
        x = np.random.default_rng(7).uniform(-1, 1, (count, 4)).astype(np.float32)
        labels = answers(linear_model(seed), self.folder, x).argmax(axis=1)
        path = self.folder / ("labelled.npz" if is_labelled else "data.npz")
        np.savez(path, **({"x": x, "labels": labels} if is_labelled else {"x": x}))
        return str(path)

    def trial(self, **changes) -> Trial:
        quick = Trial(choose=lambda manifest: manifest.variants[0], data=self.samples(), seconds=0.02, min_runs=15)
        return replace(quick, **changes)

    def promote(self, version="1.0.0", *, to="staging", name="kws", trial=None, now=NOW, **changes):
        return promote(self.repo, name, version, to=to, trial=trial or self.trial(), now=now, **changes)

    def seen(self, *, now=NOW) -> dict[tuple[str, str], int]:
        """Counter by version and channel, as a device sees them over HTTP that fetches every manifest."""
        with RepositoryServer(self.repo, "127.0.0.1", 0) as server:
            root = (self.repo / "metadata" / "1.root.json").read_bytes()
            device = TrustedRepository(self.folder / "cache", server.url, root=root, floors=Floors(), now=now)
            releases = device.refresh().releases
            for release in releases:
                device.fetch_manifest(release)
        return {(release.info.version, release.info.channel): release.info.counter for release in releases}


def verdicts(report) -> dict[str, str]:
    """By gate."""
    return {gate.gate: gate.verdict for gate in report.gates}
