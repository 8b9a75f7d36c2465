"""Evidence in bundles: model signature, bill of materials, provenance, card; and whether they speak of their bundle."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from releases import BORN, candidate_folder, candidate_record, linear_model, tiny_bundle

from edgekit.bundle.provenance import bom, intent, oms, slsa
from edgekit.bundle.provenance.attach import attach_evidence, without_evidence
from edgekit.bundle.provenance.check import check_evidence
from edgekit.bundle.provenance.facts import share_interval
from edgekit.bundle.provenance.producer_key import (
    generate_producer_key,
    load_producer_key,
    load_producer_public_key,
    make_producer_key,
)
from edgekit.bundle.provenance.reliability import Reliability, Unmeasured, judge, measure_reliability
from edgekit.bundle.provenance.unpack import unpack_bundle
from edgekit.bundle.reader import read_bundle, verify_bundle
from edgekit.bundle.sealing import seal_models
from edgekit.bundle.writer import draft_bundle, write_bundle
from edgekit.cli.main import main
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError, EnvironmentFault, TrustError, UsageError
from edgekit.evaluation.evaluate import evaluate
from edgekit.evaluation.metric import resolve_metric
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.base import encode_json
from edgekit.schema.candidate import BudgetCheck, Candidate, PassStep, Verdict
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import Parity
from edgekit.schema.measurement import HostFingerprint, LatencyReport
from edgekit.trust.signer import generate_signer

SCHEMAS = Path(__file__).parent / "cyclonedx"
PEERS = Path(os.environ.get("EDGEKIT_VENV", Path(__file__).parents[2] / ".venv")) / "peers"
OFFICIAL = PEERS / "model-signing" / "bin" / "model_signing"
HOST = HostFingerprint(
    arch="x86-64",
    cpu="Test CPU",
    isa=("avx2",),
    cores=2,
    ram_mb=1000.0,
    os="Linux",
    python="3.11.7",
    runtime="onnxruntime",
    runtime_version="1.32.0",
)
INTENT = intent.Intent(
    description=("Tells a, b and c apart.",),
    intended_use=("Sorting <script>alert(1)</script>.", "Tests."),
    out_of_scope=("People.",),
    owner=("Line team",),
    licence=("Apache-2.0",),
    ethical_considerations=("None known.",),
)


def data_for(model: Path, count: int = 150):
    """Samples whose labels the model mostly gives, and the model's answers."""
    random = np.random.default_rng(3)
    inputs = random.uniform(-1, 1, (count, 4)).astype(np.float32)
    session = open_session(model)
    scores = session.run({"x": inputs})["y"]
    session.close()
    labels = np.where(random.random(count) < 0.85, scores.argmax(axis=1), random.integers(0, 3, count))
    return make_dataset({"x": inputs}, labels=labels.astype(np.int64), source="data.npz"), {"y": scores}


def rich_candidate(folder: Path) -> Candidate:
    """A candidate with everything that evidence is made of: really evaluated, with passes, a budget and a latency."""
    model = folder / "model.onnx"
    data, answers = data_for(model)
    metric = resolve_metric("top1", has_labels=True, task="classification")
    record = candidate_record("model.onnx", model.read_bytes())
    evaluation = evaluate(answers, answers, data, metric, isa=("avx2",), labels=("a", "b", "c"))
    step = PassStep(
        name="quantize-static",
        settings={"calibration": hex_of(data.digest)[:12], "method": "minmax"},
        parent=record.source.digest,
        output=digest_bytes(model.read_bytes()),
        seconds=0.1,
        versions={"onnx": "1.23.2"},
        notes=("2 of 2 layers are int8",),
    )
    check = BudgetCheck(name="top1_drop", operator="<=", limit=0.01, value=0.0, is_met=True)
    latency = LatencyReport(
        host=HOST,
        is_on_target=False,
        threads=1,
        warmup_runs=10,
        runs=100,
        p50_ms=0.1,
        p90_ms=0.12,
        p99_ms=0.15,
        mean_ms=0.1,
        p50_low_ms=0.09,
        p50_high_ms=0.11,
        noise=0.01,
    )
    verdict = Verdict(status="chosen", is_budget_met=True, reason="the fastest", checks=(check,))
    return msgspec.structs.replace(record, evaluation=evaluation, lineage=(step,), latency=latency, verdict=verdict)


def open_model(path, *, threads, is_optimized):
    return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))


def make_draft(folder: Path, *, version: str = "1.0.0", seed: int = 0, **evidence):
    """A draft with evidence, and its data."""
    candidate_folder(folder, seed=seed)
    (folder / "candidate.json").write_bytes(encode_json(rich_candidate(folder)))
    data, _ = data_for(folder / "model.onnx")
    draft = draft_bundle(folder, name="kws", version=version, open_session=open_model, data=data, created_at=BORN)
    return attach_evidence(draft, **({"intent": INTENT, "data": data, "open_session": open_model} | evidence))


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture(scope="module")
def producer():
    return generate_producer_key()


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return make_draft(tmp_path_factory.mktemp("draft") / "out")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another release of another model."""
    return make_draft(tmp_path_factory.mktemp("other") / "out", version="2.0.0", seed=1)


@pytest.fixture(scope="module")
def bundle(draft, signer, producer, tmp_path_factory):
    ready = oms.sign_files(draft, producer)
    path = tmp_path_factory.mktemp("bundle") / "kws.edgekit"
    write_bundle(ready.manifest, ready.blobs, signer=signer, out=path)
    return verify_bundle(path, [signer.public_key])


def content(draft, path: str) -> bytes:
    ref = next(ref for ref in draft.manifest.blobs if ref.path == path)
    found = draft.blobs[ref.digest]
    return found if isinstance(found, bytes) else found.read_bytes()


def swapped(draft, path: str, new: bytes):
    """The draft with another content at a path."""
    ref = next(ref for ref in draft.manifest.blobs if ref.path == path)
    fresh = msgspec.structs.replace(ref, digest=digest_bytes(new), size_bytes=len(new))
    refs = tuple(fresh if each is ref else each for each in draft.manifest.blobs)
    blobs = {key: value for key, value in draft.blobs.items() if key != ref.digest} | {fresh.digest: new}
    return replace(draft, manifest=msgspec.structs.replace(draft.manifest, blobs=refs), blobs=blobs)


def written(draft, signer, folder: Path):
    path = folder / "b.edgekit"
    write_bundle(draft.manifest, draft.blobs, signer=signer, out=path)
    return read_bundle(path)


# --- the model signature ----------------------------------------------------------------------------------------------------


def official(*arguments) -> subprocess.CompletedProcess[str]:
    if not OFFICIAL.exists():
        missing = PEERS / "model-signing.missing"
        pytest.skip(
            missing.read_text().strip() if missing.exists() else "model-signing is not installed: run scripts/peer-tools"
        )
    return subprocess.run([OFFICIAL, *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_signed_folder_verifies_with_the_official_tool_and_ours_until_a_file_changes(bundle, producer, tmp_path):
    key = tmp_path / "oms.pub"
    key.write_bytes(producer.public_key.pem)
    folder = tmp_path / "release"
    unpack_bundle(bundle, folder)
    arguments = ("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", key)
    assert oms.verify_folder(folder, producer.public_key).name == "kws-1.0.0"
    assert (done := official(*arguments)).returncode == 0, done.stderr
    for path in ("model.onnx", "bom.cdx.json"):
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert official(*arguments).returncode != 0
        with pytest.raises(TrustError, match=re.escape(f"{path} is not the file that was signed")):
            oms.verify_folder(folder, producer.public_key)
        (folder / path).write_bytes(data)
    assert official(*arguments).returncode == 0


def test_folder_that_the_official_tool_signed_verifies_with_ours(producer, tmp_path):
    folder, key = tmp_path / "model", tmp_path / "key.pem"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "sub" / "labels.txt").write_bytes(b"a\nb\n")
    key.write_bytes(producer.to_pem())
    done = official("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", key)
    assert done.returncode == 0, done.stderr
    assert set(oms.verify_folder(folder, producer.public_key).files) == {"weights.bin", "sub/labels.txt"}
    (folder / "sub" / "labels.txt").write_bytes(b"b\na\n")
    with pytest.raises(TrustError):
        oms.verify_folder(folder, producer.public_key)


def test_signature_covers_every_blob_but_itself_and_is_the_same_each_time(draft, producer):
    first, second = (oms.sign_files(draft, producer) for _ in range(2))
    assert first.manifest == second.manifest
    found = oms.verify_signature(content(first, "model.sig"), producer.public_key)
    assert found.files == {ref.path: ref.digest for ref in draft.manifest.blobs}
    assert {"model.onnx", "golden.msgpack", "candidate.json", "bom.cdx.json", "provenance.intoto.json", "card.md"} <= set(
        found.files
    )
    statement = json.loads(base64.b64decode(json.loads(content(first, "model.sig"))["dsseEnvelope"]["payload"]))
    assert statement["predicate"]["serialization"]["allow_symlinks"] is False
    with pytest.raises(UsageError, match="already"):
        oms.sign_files(first, producer)


@pytest.fixture
def signed_folder(producer, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    (folder / "model.sig").write_bytes(oms.sign({"a": digest_bytes(b"a")}, producer, name="r"))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "a").unlink(), "a is signed and not there"),
        (lambda folder: (folder / "b").write_bytes(b""), "b is not signed"),
        (lambda folder: (folder / "a").write_bytes(b"A"), "a is not the file that was signed"),
        (lambda folder: (folder / "link").symlink_to("a"), "neither a file nor a folder"),
        (lambda folder: os.mkfifo(folder / "pipe"), "neither a file nor a folder"),
    ],
)
def test_folder_that_differs_is_refused(signed_folder, producer, change, words):
    oms.verify_folder(signed_folder, producer.public_key)
    change(signed_folder)
    with pytest.raises(TrustError, match=words):
        oms.verify_folder(signed_folder, producer.public_key)


def changed_signature(data: bytes, change) -> bytes:
    """The signature with its statement changed and not signed again."""
    record = json.loads(data)
    statement = json.loads(base64.b64decode(record["dsseEnvelope"]["payload"]))
    change(record, statement)
    record["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda record, statement: statement["subject"][0].update(name="x"), "oms.signature"),
        (lambda record, statement: statement["predicate"]["resources"][0].update(name="x"), "oms.signature"),
        (lambda record, statement: statement["predicate"]["resources"][0].update(digest="0" * 64), "oms.malformed"),
        (lambda record, statement: statement["predicate"]["resources"][0].update(digest="zz"), "oms.malformed"),
        (lambda record, statement: statement["predicate"]["serialization"].update(method="shards"), "oms.malformed"),
        (lambda record, statement: statement.update(predicateType="https://model_signing/Digests/v0.1"), "oms.malformed"),
        (lambda record, statement: statement.update(subject=[]), "oms.malformed"),
        (lambda record, statement: record.update(mediaType="application/json"), "oms.malformed"),
        (lambda record, statement: record["dsseEnvelope"].update(payloadType="text/plain"), "oms.malformed"),
        (lambda record, statement: record["dsseEnvelope"].update(signatures=[]), "oms.malformed"),
        (lambda record, statement: record["verificationMaterial"]["publicKey"].update(hint="0" * 64), "oms.untrusted_key"),
    ],
)
def test_changed_signature_is_refused(producer, change, code):
    data = oms.sign({"a": digest_bytes(b"a"), "b": digest_bytes(b"b")}, producer, name="r")
    oms.verify_signature(data, producer.public_key)
    with pytest.raises(TrustError) as caught:
        oms.verify_signature(changed_signature(data, change), producer.public_key)
    assert caught.value.code == code


def test_signature_of_another_key_with_our_hint_is_refused(producer):
    data = json.loads(oms.sign({"a": digest_bytes(b"a")}, generate_producer_key(), name="r"))
    data["verificationMaterial"]["publicKey"]["hint"] = producer.public_key.keyid
    with pytest.raises(TrustError) as caught:
        oms.verify_signature(json.dumps(data).encode(), producer.public_key)
    assert caught.value.code == "oms.signature"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_refused_signature(data):
    with pytest.raises(TrustError):
        oms.parse_signature(data)


def test_producer_key_files(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEKIT_KEY_PASSPHRASE", raising=False)
    keyid = make_producer_key(tmp_path / "k.pem", tmp_path / "k.pub")
    assert load_producer_key(tmp_path / "k.pem").public_key.keyid == keyid
    assert load_producer_public_key(tmp_path / "k.pub").keyid == keyid
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    (tmp_path / "ed.pem").write_bytes(generate_signer().to_pem())
    (tmp_path / "ed.pem").chmod(0o600)
    (tmp_path / "open.pem").write_bytes((tmp_path / "k.pem").read_bytes())
    (tmp_path / "open.pem").chmod(0o644)
    for name, load, code in (
        ("k.pub", load_producer_key, "key.public"),
        ("k.pem", load_producer_public_key, "key.private"),
        ("ed.pem", load_producer_key, "key.malformed"),
        ("open.pem", load_producer_key, "key.mode"),
        ("none.pem", load_producer_key, "key.not_found"),
    ):
        with pytest.raises(UsageError) as caught:
            load(tmp_path / name)
        assert caught.value.code == code
    with pytest.raises(UsageError, match="exists already"):
        make_producer_key(tmp_path / "k.pem", tmp_path / "new.pub")


def test_encrypted_producer_key_needs_its_passphrase(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", "right")
    keyid = make_producer_key(tmp_path / "k.pem", tmp_path / "k.pub")
    assert b"ENCRYPTED" in (tmp_path / "k.pem").read_bytes()
    assert load_producer_key(tmp_path / "k.pem").public_key.keyid == keyid
    for passphrase in ("wrong", ""):
        monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", passphrase)
        with pytest.raises(UsageError) as caught:
            load_producer_key(tmp_path / "k.pem")
        assert caught.value.code == "key.passphrase"


def test_verification_without_cryptography_says_what_is_missing(tmp_path, producer, monkeypatch):
    (tmp_path / "k.pub").write_bytes(producer.public_key.pem)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ec", None)
    with pytest.raises(EnvironmentFault) as caught:
        load_producer_public_key(tmp_path / "k.pub")
    assert caught.value.code == "cryptography.missing"
    assert "pip install" in caught.value.hint


# --- the bill of materials --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cyclonedx():
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SCHEMAS.glob("*.json"))]
    registry = Registry().with_resources([(each["$id"], Resource.from_contents(each)) for each in documents])
    return Draft7Validator(next(each for each in documents if "bom-1.6" in each["$id"]), registry=registry)


def test_bill_fits_the_cyclonedx_schema(draft, cyclonedx):
    document = json.loads(content(draft, bom.BOM_PATH))
    assert [error.message for error in cyclonedx.iter_errors(document)] == []
    document["metadata"]["component"]["modelCard"]["mood"] = "good"
    assert not cyclonedx.is_valid(document)


def test_bill_without_any_evidence_of_quality_fits_the_schema(tmp_path, cyclonedx):
    """A candidate that nobody evaluated, and an owner who said nothing."""
    plain = draft_bundle(candidate_folder(tmp_path / "out"), name="kws", version="1.0.0", open_session=open_model)
    document = json.loads(content(attach_evidence(plain), bom.BOM_PATH))
    assert [error.message for error in cyclonedx.iter_errors(document)] == []


def test_bill_says_what_is_in_it_and_how_good_it_is(draft):
    document = json.loads(content(draft, bom.BOM_PATH))
    model = next(item for item in document["components"] if item["name"] == "model.onnx")
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": hex_of(draft.manifest.variants[0].model)}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    evaluation = draft.manifest.candidate.evaluation
    top1 = next(item for item in metrics if item["type"] == "top1")
    low, high = share_interval(evaluation.value, evaluation.samples)
    assert top1["value"] == f"{evaluation.value:.6g}"
    assert top1["confidenceInterval"] == {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    slices = {item["slice"]: item for item in metrics if item["type"] == "recall"}
    assert set(slices) == {"class a", "class b", "class c"}
    assert all("confidenceInterval" in item for item in slices.values())
    considerations = document["metadata"]["component"]["modelCard"]["considerations"]
    assert considerations["useCases"] == list(INTENT.intended_use)
    data = next(item for item in document["components"] if item["type"] == "data" and item["name"] == "evaluation data")
    assert data["hashes"][0]["content"] == hex_of(evaluation.data)


@pytest.mark.parametrize(
    ("share", "samples", "low", "high"), [(0.9, 300, 0.8608, 0.9291), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)]
)
def test_interval_of_a_share_is_wilsons(share, samples, low, high):
    assert share_interval(share, samples) == pytest.approx((low, high), abs=5e-5)


def test_dependencies_of_the_bill_name_runtime_and_tools_that_it_lists(draft):
    document = json.loads(content(draft, bom.BOM_PATH))
    known = {item["bom-ref"] for item in document["components"]} | {"release"}
    needs = {item["ref"]: item.get("dependsOn", []) for item in document["dependencies"]}
    assert set(needs) == known
    assert {ref for refs in needs.values() for ref in refs} <= known
    model = next(ref for ref in needs if ref.startswith("model:"))
    assert needs["release"] == [model]
    assert any(ref.startswith("runtime:onnxruntime@") for ref in needs[model])
    assert {"tool:edgekit@0.1.0", "tool:onnx@1.23.2"} <= set(needs[model])


def test_serial_number_follows_from_the_digests(draft, other, tmp_path):
    other_model = make_draft(tmp_path / "model", seed=1)
    serials = [json.loads(content(each, bom.BOM_PATH))["serialNumber"] for each in (draft, other, other_model)]
    assert len(set(serials)) == 3
    again = make_draft(tmp_path / "again")
    assert content(again, bom.BOM_PATH) == content(draft, bom.BOM_PATH)


# --- provenance -------------------------------------------------------------------------------------------------------------


def test_provenance_says_how_the_model_was_made(draft):
    statement = json.loads(content(draft, "provenance.intoto.json"))
    candidate = draft.manifest.candidate
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"] == [{"name": "model.onnx", "digest": {"sha256": hex_of(draft.manifest.variants[0].model)}}]
    definition, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    parameters = definition["externalParameters"]
    assert (parameters["target"], parameters["metric"], parameters["seed"]) == ("host", "top1", 0)
    assert parameters["budget"] == [{"name": "top1_drop", "operator": "<=", "limit": 0.01}]
    assert parameters["passes"][0]["settings"]["method"] == "minmax"
    named = {item["annotations"]["role"]: item["digest"]["sha256"] for item in definition["resolvedDependencies"]}
    assert named == {
        "source model": hex_of(candidate.source.digest),
        "target profile": hex_of(candidate.target_digest),
        "evaluation and calibration data": hex_of(candidate.evaluation.data),
    }
    assert details["builder"]["version"] == {"edgekit": "0.1.0", "python": "3.11.7"}
    assert details["builder"]["builderDependencies"] == [{"name": "onnx", "uri": "pkg:pypi/onnx@1.23.2"}]
    assert details["metadata"]["finishedOn"] == "2026-11-01T12:00:00Z"
    assert details["byproducts"][0]["annotations"]["value"] == candidate.evaluation.value


# --- the card ---------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a page asks a browser to do, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "action", "data", "style"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_page_is_self_contained_without_scripts_and_shows_names_as_text(draft):
    text = content(draft, "card.html").decode()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert {"script", "link", "img", "iframe", "form"} & set(page.tags) == set()
    assert "url(" not in text
    assert "@import" not in text
    assert "Sorting <script>alert(1)</script>." in page.words
    assert "prefers-color-scheme: dark" in text


def test_card_states_what_is_known_in_both_forms(draft):
    evaluation = draft.manifest.candidate.evaluation
    page, text = Page(content(draft, "card.html").decode()).words, content(draft, "card.md").decode()
    for words in (
        "Line team",
        "Apache-2.0",
        f"{evaluation.value:.4f}",
        evaluation.data,
        "Test CPU",
        "quantize-static",
        "not stated",
    ):
        assert words in page
        assert words in text.replace("\\", "")
    assert "This is not the target" in page
    assert "The ranges of the activations were taken from the data that the model was evaluated on." in page
    assert "\\<script\\>" in text
    assert "expected calibration error" in text


def test_card_without_words_and_data_says_that_nothing_was_stated_or_measured(tmp_path):
    draft = make_draft(tmp_path / "out", intent=None, data=None)
    text = content(draft, "card.md").decode()
    assert "## Intended use\n\n*not stated*" in text
    assert "Not measured: no labelled data was given" in text
    assert "not recorded; the digest tells it" in text


def test_reliability_is_what_the_definition_says():
    """Two bins: 0.9 sure and right in 3 of 4, 0.6 sure and right in 1 of 2."""
    scores = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    found = judge(scores, np.array([0, 0, 0, 1, 1, 0]))
    assert found.error == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.1)
    assert (found.accuracy, found.is_softmax) == (pytest.approx(4 / 6), False)
    assert found.class_counts == (4, 2)
    assert {each.count for each in found.bins} == {0, 2, 4}
    same = judge(np.log(scores) + 7, np.array([0, 0, 0, 1, 1, 0]))
    assert same.is_softmax
    assert same.error == pytest.approx(found.error)


def test_reliability_runs_the_model_on_the_samples_it_is_given(tmp_path):
    (tmp_path / "model.onnx").write_bytes(linear_model())
    data, answers = data_for(tmp_path / "model.onnx")
    contract = candidate_record("model.onnx", b"").contract

    def opener(**options):
        return open_model(tmp_path / "model.onnx", **options)

    found = measure_reliability(opener, contract, data)
    assert isinstance(found, Reliability)
    assert found.error == pytest.approx(judge(answers["y"].astype(float), data.labels).error)
    part = measure_reliability(opener, contract, data, max_samples=20)
    assert (part.samples, part.of) == (20, 150)
    for labels in (None, np.full(150, 3), np.zeros(150)):
        assert isinstance(measure_reliability(opener, contract, replace(data, labels=labels)), Unmeasured)


def test_card_file_in_toml_and_in_markdown_say_the_same(tmp_path):
    (tmp_path / "c.toml").write_text('intended_use = ["Doors.", "Lifts."]\nlicense = "MIT"\ndescription = "A spotter."\n')
    (tmp_path / "c.md").write_text("# Key words\n\nA spotter.\n\n## Intended use\n\n- Doors.\n- Lifts.\n\n## License\n\nMIT\n")
    assert intent.load_intent(tmp_path / "c.toml") == intent.load_intent(tmp_path / "c.md")
    assert intent.load_intent(tmp_path / "c.md").licence == ("MIT",)


@pytest.mark.parametrize(
    ("name", "text", "code", "hint"),
    [
        ("c.toml", 'intented_use = "x"', "card.unknown_field", 'Did you mean "intended_use"?'),
        ("c.md", "# T\n\n## Intended uses\n\nx", "card.unknown_field", 'Did you mean "intended_use"?'),
        ("c.toml", "owner = 3", "card.malformed", ""),
        ("c.toml", "owner = [[1]]", "card.malformed", ""),
        ("c.toml", "owner = ", "card.malformed", ""),
        ("c.txt", "", "card.malformed", "Fields"),
    ],
)
def test_card_file_that_cannot_be_read_is_refused_with_a_hint(tmp_path, name, text, code, hint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        intent.load_intent(tmp_path / name)
    assert caught.value.code == code
    assert hint in caught.value.hint


@given(st.text(max_size=300))
@settings(deadline=None)
def test_any_markdown_is_words_or_a_refusal(text):
    try:
        found = intent.parse_markdown(text)
    except UsageError:
        return
    assert all(line.strip() for name in intent.FIELDS for line in getattr(found, name))


# --- does it fit the bundle? ------------------------------------------------------------------------------------------------


def test_evidence_of_this_bundle_is_accepted_and_summed_up(bundle, producer):
    found = check_evidence(bundle, producer.public_key)
    assert found.is_signature_verified
    assert found.cards == ("card.md", "card.html")
    assert found.boms[0].models == 1
    assert "onnx 1.23.2" in found.boms[0].tools
    assert found.provenance[0].passes == ("quantize-static",)
    assert not check_evidence(bundle).is_signature_verified
    with pytest.raises(TrustError) as caught:
        check_evidence(bundle, generate_producer_key().public_key)
    assert caught.value.code == "oms.untrusted_key"


@pytest.mark.parametrize("path", ["bom.cdx.json", "provenance.intoto.json", "card.md", "card.html"])
def test_evidence_of_another_release_is_refused(draft, other, signer, tmp_path, path):
    with pytest.raises(TrustError) as caught:
        check_evidence(written(swapped(draft, path, content(other, path)), signer, tmp_path))
    assert caught.value.code == "evidence.mismatch"
    assert path in caught.value.message


@pytest.mark.parametrize("role", ["model", "golden", "candidate", "report", "source", "target", "evaluation-data"])
def test_bill_with_a_digest_that_the_manifest_has_not_is_refused(draft, signer, tmp_path, role):
    document = json.loads(content(draft, bom.BOM_PATH))
    component = next(
        item for item in document["components"] if {"name": bom.ROLE_PROPERTY, "value": role} in item["properties"]
    )
    component["hashes"][0]["content"] = "0" * 64
    with pytest.raises(TrustError, match=f"the {role} sha256"):
        check_evidence(written(swapped(draft, bom.BOM_PATH, json.dumps(document).encode()), signer, tmp_path))


def test_bill_about_another_version_is_refused(draft, signer, tmp_path):
    document = json.loads(content(draft, bom.BOM_PATH))
    document["metadata"]["component"]["version"] = "1.0.1"
    with pytest.raises(TrustError, match=r"it is about kws@1\.0\.1"):
        check_evidence(written(swapped(draft, bom.BOM_PATH, json.dumps(document).encode()), signer, tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda definition, details: definition["resolvedDependencies"][0]["digest"].update(sha256="0" * 64),
        lambda definition, details: definition["resolvedDependencies"].pop(),
        lambda definition, details: details["byproducts"][0]["digest"].update(sha256="0" * 64),
    ],
)
def test_provenance_with_other_digests_is_refused(draft, signer, tmp_path, change):
    document = json.loads(content(draft, "provenance.intoto.json"))
    change(document["predicate"]["buildDefinition"], document["predicate"]["runDetails"])
    with pytest.raises(TrustError) as caught:
        check_evidence(written(swapped(draft, "provenance.intoto.json", json.dumps(document).encode()), signer, tmp_path))
    assert caught.value.code == "evidence.mismatch"


@pytest.mark.parametrize("path", ["bom.cdx.json", "provenance.intoto.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_evidence_that_cannot_be_read_is_refused(draft, signer, tmp_path, path, data):
    with pytest.raises(TrustError) as caught:
        check_evidence(written(swapped(draft, path, data), signer, tmp_path))
    assert caught.value.code == "evidence.malformed"


def test_signature_over_other_files_is_refused(draft, other, signer, producer, tmp_path):
    signed = oms.sign_files(draft, producer)
    foreign = content(oms.sign_files(other, producer), "model.sig")
    with pytest.raises(TrustError) as caught:
        check_evidence(written(swapped(signed, "model.sig", foreign), signer, tmp_path), producer.public_key)
    assert caught.value.code == "oms.files"


def test_evidence_of_sealed_release_names_contents_and_signature_what_travels(draft, signer, producer, tmp_path):
    age = pytest.importorskip("pyrage")
    sealed = seal_models(draft, [str(age.x25519.Identity.generate().to_public())])
    found = check_evidence(written(oms.sign_files(sealed, producer), signer, tmp_path), producer.public_key)
    assert "model.onnx.age" in found.signature.files
    assert "model.onnx" not in found.signature.files
    assert found.boms[0].models == 1


def test_evidence_is_replaced_not_doubled(draft):
    again = attach_evidence(draft, intent=INTENT)
    roles = [ref.role for ref in again.manifest.blobs]
    assert (roles.count("bom"), roles.count("provenance"), roles.count("card")) == (1, 1, 3)
    assert {ref.role for ref in without_evidence(again).manifest.blobs} == {"model", "golden", "candidate", "report"}


def two_variants(draft, folder: Path):
    """The draft with a second variant of another model."""
    base, more = without_evidence(draft), without_evidence(make_draft(folder / "second", seed=1))
    first, second = base.manifest.variants[0], more.manifest.variants[0]
    record = next(ref for ref in more.manifest.blobs if ref.role == "candidate")
    extra = [ref for ref in more.manifest.blobs if ref.role in {"model", "golden", "candidate"}]
    parity = Parity(reference=first.name, samples=150, data=None, sqnr_db=31.0, agreement=0.95)
    variant = msgspec.structs.replace(second, name="second", target="board", candidate=record.digest, parity=parity)
    for ref in extra:
        base = base.with_blob(f"variants/second/{ref.path}", ref.role, more.blobs[ref.digest])
    return replace(base, manifest=msgspec.structs.replace(base.manifest, variants=(first, variant)))


def test_each_variant_has_its_statement_component_and_row(draft, signer, producer, tmp_path, cyclonedx):
    both = attach_evidence(two_variants(draft, tmp_path), intent=INTENT)
    document = json.loads(content(both, bom.BOM_PATH))
    assert cyclonedx.is_valid(document)
    found = check_evidence(written(oms.sign_files(both, producer), signer, tmp_path), producer.public_key)
    assert [item.subject for item in found.provenance] == ["model.onnx", "variants/second/model.onnx"]
    assert [item.path for item in found.provenance] == ["provenance.intoto.json", "provenance.2.intoto.json"]
    assert found.boms[0].models == 2
    assert "agreement 0.9500, SQNR 31.0 dB" in content(both, "card.md").decode()
    kept = tuple(ref for ref in both.manifest.blobs if ref.path != "provenance.2.intoto.json")
    digests = {ref.digest for ref in kept}
    less = replace(
        both,
        manifest=msgspec.structs.replace(both.manifest, blobs=kept),
        blobs={digest: data for digest, data in both.blobs.items() if digest in digests},
    )
    with pytest.raises(TrustError, match=r"no statement of how variants/second/model\.onnx was made"):
        check_evidence(written(less, signer, tmp_path))


def test_provenance_paths_are_blob_paths():
    assert [slsa.provenance_path(index) for index in range(3)] == [
        "provenance.intoto.json",
        "provenance.2.intoto.json",
        "provenance.3.intoto.json",
    ]


# --- unpacking --------------------------------------------------------------------------------------------------------------


def test_unpacked_folder_has_the_blobs_by_path(bundle, tmp_path):
    unpack_bundle(bundle, tmp_path / "new" / "release")
    found = {path.relative_to(tmp_path / "new" / "release").as_posix(): digest_bytes(path.read_bytes())
             for path in (tmp_path / "new" / "release").rglob("*") if path.is_file()}  # fmt: skip
    assert found == {ref.path: ref.digest for ref in bundle.manifest.blobs}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["release"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_unpack_replaces_nothing(bundle, tmp_path, kind):
    target = tmp_path / "there"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to(tmp_path / "elsewhere")}[kind]()
    with pytest.raises(UsageError, match="exists already"):
        unpack_bundle(bundle, target)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_unpack_of_a_file_that_is_a_folder_too_is_refused(draft, signer, tmp_path):
    crossed = draft.with_blob("card.md/more", "card", b"x")
    with pytest.raises(ArtifactError) as caught:
        unpack_bundle(written(crossed, signer, tmp_path), tmp_path / "out")
    assert caught.value.code == "unpack.paths"
    assert not (tmp_path / "out").exists()


def test_unpack_of_a_bundle_that_changed_leaves_nothing(draft, signer, tmp_path):
    found = written(draft, signer, tmp_path)
    data = bytearray(found.path.read_bytes())
    place = data.index(b"Line team")
    data[place : place + 4] = b"line"
    found.path.write_bytes(data)
    with pytest.raises(TrustError, match="changed after it was checked"):
        unpack_bundle(found, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["b.edgekit"]


# --- the commands -----------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Keys, an output folder, data and a card file."""
    folder = tmp_path_factory.mktemp("world")
    candidate_folder(folder / "out")
    (folder / "out" / "candidate.json").write_bytes(encode_json(rich_candidate(folder / "out")))
    data, _ = data_for(folder / "out" / "model.onnx")
    np.savez(folder / "data.npz", x=data.inputs["x"], labels=data.labels)
    (folder / "card.toml").write_text('intended_use = "Doors."\nowner = "Line team"\n')
    assert main(["bundle", "keygen", "--out", str(folder / "publisher")]) == 0
    assert main(["bundle", "keygen", "--scheme", "ecdsa-p256", "--out", str(folder / "oms")]) == 0
    return folder


def pack(world, out, *more):
    arguments = ["--name", "kws", "--version", "1.0.0", "--key", world / "publisher.pem", "--out", out, *more]
    return main([str(argument) for argument in ("bundle", "pack", world / "out", *arguments)])


def test_packed_bundle_is_verified_inspected_and_unpacked(world, capsys, tmp_path):
    file, folder = tmp_path / "kws.edgekit", tmp_path / "files"
    more = ("--data", world / "data.npz", "--card", world / "card.toml", "--oms-key", world / "oms.pem")
    assert pack(world, file, *more) == 0
    capsys.readouterr()
    code, out, _ = run(capsys, "bundle", "verify", file, "--key", world / "publisher.pub", "--oms-key", world / "oms.pub")
    assert code == 0
    for words in (
        "is intact",
        "provenance: model.onnx from m.onnx",
        "CycloneDX 1.6",
        "card.md, card.html",
        "over 11 files (verified)",
    ):
        assert words in out
    _, out, _ = run(capsys, "bundle", "inspect", file, "--key", world / "publisher.pub")
    evidence = out[out.index("\nevidence\n") :]
    assert "OMS v1.0 by" in evidence
    assert "not verified: give --oms-key" in evidence
    assert run(capsys, "bundle", "unpack", file, folder, "--key", world / "publisher.pub")[0] == 0
    text = (folder / "card.md").read_text()
    assert "Doors." in text
    assert "data.npz" in text
    code, out, _ = run(capsys, "bundle", "verify", folder, "--oms-key", world / "oms.pub")
    assert code == 0
    assert "11 files of kws-1.0.0 are as they were signed" in out
    (folder / "card.md").write_text("better")
    assert run(capsys, "bundle", "verify", folder, "--oms-key", world / "oms.pub")[0] == 4
    assert run(capsys, "bundle", "verify", folder)[0] == 2


def test_pack_with_evidence_can_be_made_again_byte_for_byte(world, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    more = ("--data", world / "data.npz", "--card", world / "card.toml", "--oms-key", world / "oms.pem")
    assert [pack(world, tmp_path / name, *more) for name in ("a", "b")] == [0, 0]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bundle_without_evidence_verifies_and_says_so(capsys, tmp_path, world):
    from edgekit.trust.signer import load_signer

    file = tiny_bundle(tmp_path / "b.edgekit", load_signer(world / "publisher.pem"))
    code, out, _ = run(capsys, "bundle", "verify", file, "--key", world / "publisher.pub")
    assert code == 0
    assert "none in this bundle" in out
    code, out, err = run(capsys, "bundle", "verify", file, "--key", world / "publisher.pub", "--oms-key", world / "oms.pub")
    assert (code, out) == (4, "")
    assert "no model signature" in err


@pytest.mark.parametrize(
    ("option", "name"), [("--card", "none.toml"), ("--oms-key", "publisher.pem"), ("--oms-key", "none.pem")]
)
def test_pack_with_unusable_card_or_key_exits_2_and_writes_nothing(world, capsys, tmp_path, option, name):
    assert pack(world, tmp_path / "b", option, world / name) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_evidence_of_another_release_exits_4_before_anything_is_said(draft, other, world, capsys, tmp_path):
    from edgekit.trust.signer import load_signer

    mixed = swapped(draft, "card.md", content(other, "card.md"))
    written(mixed, load_signer(world / "publisher.pem"), tmp_path)
    code, out, err = run(capsys, "bundle", "verify", tmp_path / "b.edgekit", "--key", world / "publisher.pub")
    assert (code, out) == (4, "")
    assert "card.md" in err
