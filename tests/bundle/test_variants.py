"""One release, several variants: rules from targets, order, parity, and what a device takes."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from releases import CONTRACT, candidate_folder

from edgekit.agent.plan import DeviceFacts, choose_variant
from edgekit.bundle.parity import check_contract, measure_parity, parse_limit
from edgekit.bundle.reader import parse_manifest, verify_bundle
from edgekit.bundle.selection import requires_of, strictness
from edgekit.bundle.writer import add_variant, draft_bundle, write_bundle
from edgekit.cli.main import main
from edgekit.errors import ArtifactError, DeviceError, UsageError
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.manifest import Requires
from edgekit.schema.measurement import HostFingerprint, LatencyReport
from edgekit.schema.variants import MadeVariant, VariantList
from edgekit.target.load import load_target
from edgekit.trust.signer import generate_signer

BORN = datetime(2026, 11, 1, tzinfo=UTC)


def open_model(path, *, threads, is_optimized):
    return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))


def folder_of(place, *, seed=0, target="host", precision="fp32", changes=()):
    """An output folder whose candidate is for a target."""
    candidate_folder(place, seed=seed)
    record = decode_json((place / "candidate.json").read_bytes(), Candidate)
    artifact = msgspec.structs.replace(record.artifact, precision=precision)
    record = msgspec.structs.replace(record, target=target, name=precision, artifact=artifact, **dict(changes))
    (place / "candidate.json").write_bytes(encode_json(record))
    return place


def facts(arch="x86-64", isa=("avx2",), runtimes=None):
    known = runtimes or {"onnxruntime": "1.99.0"}
    return DeviceFacts(arch=arch, cpu="", isa=isa, cores=1, ram_mb=1000, os="", runtimes=known)


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("x86-64-avx512-vnni", "int8", Requires(runtime="onnxruntime", arch=("x86-64",), isa_any=("avx512_vnni", "avx_vnni"))),
        ("x86-64-avx2", "int8", Requires(runtime="onnxruntime", arch=("x86-64",), isa=("avx2",))),
        ("raspberry-pi-4", "int8", Requires(runtime="onnxruntime", arch=("aarch64",))),
        ("raspberry-pi-5", "int8", Requires(runtime="onnxruntime", arch=("aarch64",), isa=("dotprod",))),
        ("raspberry-pi-4", "fp32", Requires(runtime="onnxruntime")),
        ("x86-64-avx512-vnni", "fp32", Requires(runtime="onnxruntime")),
    ],
)
def test_rules_follow_from_the_target(target, precision, expected):
    found = requires_of(load_target(target), precision=precision, runtime="onnxruntime", runtime_version="1.32.0")
    assert found == msgspec.structs.replace(expected, runtime_version="1.32")


def test_nothing_but_the_runtime_is_asked_for_without_a_target():
    found = requires_of(None, precision="int8", runtime="litert", runtime_version="2.1.3")
    assert found == Requires(runtime="litert", runtime_version="2.1")
    assert strictness(found) == 0


@pytest.fixture
def release(tmp_path):
    """Full-range int8 for VNNI, 7-bit for AVX2, and float32 for everybody; the same weights, so parity is perfect."""
    draft = draft_bundle(
        folder_of(tmp_path / "a", target="x86-64-avx512-vnni", precision="int8"),
        name="kws",
        version="1.0",
        open_session=open_model,
        profile=load_target("x86-64-avx512-vnni"),
        created_at=BORN,
    )
    for name, target, precision in (("b", "x86-64-avx2", "int8"), ("c", "host", "fp32")):
        place = folder_of(tmp_path / name, target=target, precision=precision)
        profile = load_target(target) if target != "host" else None
        draft = add_variant(draft, place, open_session=open_model, profile=profile)
    return draft


def test_each_device_takes_the_first_variant_that_it_meets(release):
    manifest = release.manifest
    taken = [
        choose_variant(manifest, facts(isa=isa, arch=arch)).name
        for arch, isa in [("x86-64", ("avx2", "avx_vnni")), ("x86-64", ("avx2",)), ("x86-64", ()), ("aarch64", ("neon",))]
    ]
    assert taken == ["int8", "int8-x86-64-avx2", "fp32", "fp32"]
    with pytest.raises(DeviceError) as caught:
        choose_variant(manifest, facts(runtimes={"litert": "2.0"}))
    assert caught.value.message.count("onnxruntime") >= 3


def test_variants_carry_parity_and_their_own_evidence(release, tmp_path):
    manifest = release.manifest
    assert [variant.parity is None for variant in manifest.variants] == [True, False, False]
    parity = manifest.variants[1].parity
    assert (parity.reference, parity.agreement, parity.is_met, parity.limit) == ("int8", 1.0, True, "agreement>=0.95")
    roles = {ref.digest: ref.role for ref in manifest.blobs}
    assert [roles[variant.candidate] for variant in manifest.variants[1:]] == ["candidate", "candidate"]
    assert sum(ref.role == "model" for ref in manifest.blobs) == 1  # equal bytes are stored once
    signer = generate_signer()
    path = write_bundle(manifest, release.blobs, signer=signer, out=tmp_path / "r.edgekit")
    assert verify_bundle(path, [signer.public_key]).manifest == manifest


def test_variant_that_answers_otherwise_is_refused(tmp_path):
    draft = draft_bundle(folder_of(tmp_path / "a"), name="kws", version="1.0", open_session=open_model, created_at=BORN)
    with pytest.raises(ArtifactError) as caught:
        add_variant(draft, folder_of(tmp_path / "b", seed=5, precision="int8"), open_session=open_model)
    assert caught.value.code == "variant.parity"
    assert "agreement" in caught.value.message


def test_variant_with_another_contract_is_refused():
    other = msgspec.structs.replace(CONTRACT, labels=("a", "c", "b"))
    with pytest.raises(ArtifactError) as caught:
        check_contract(CONTRACT, other, "int8")
    assert caught.value.code == "variant.contract"
    free = msgspec.structs.replace(CONTRACT, inputs=(msgspec.structs.replace(CONTRACT.inputs[0], shape=("N", 4), maximum=9.0),))
    check_contract(CONTRACT, free, "int8")  # another name of a free axis, another range


class Fixed:
    runtime = runtime_version = ""

    def __init__(self, answers):
        self.answers = iter(answers)

    def run(self, feeds):
        return {"y": next(self.answers)}

    def close(self):
        pass


def test_parity_counts_what_differs():
    first = [np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]), np.array([[3.0, 0.0]])]
    second = [*first[:3], np.array([[0.0, 3.0]])]
    found = measure_parity(Fixed(first), Fixed(second), [{}] * 4, reference="a", contract=CONTRACT, limit="agreement>=0.75")
    assert (found.agreement, found.is_met, found.samples) == (0.75, True, 4)
    assert found.sqnr_db == pytest.approx(10 * np.log10(15 / 18), abs=0.01)
    found = measure_parity(Fixed(first), Fixed(second), [{}] * 4, reference="a", contract=CONTRACT, limit="sqnr_db>=0")
    assert not found.is_met


@pytest.mark.parametrize("text", ["agreement", "top1>=0.9", "agreement>=x", "agreement<=1"])
def test_limit_that_is_none(text):
    with pytest.raises(UsageError):
        parse_limit(text)


def test_manifest_with_two_variants_of_one_name(release):
    twice = msgspec.structs.replace(release.manifest, variants=(release.manifest.variants[0],) * 2)
    with pytest.raises(ArtifactError, match="one name"):
        parse_manifest(encode_json(twice))
    stranger = msgspec.structs.replace(release.manifest.variants[1], candidate=release.manifest.variants[1].model)
    with pytest.raises(ArtifactError, match="candidate"):
        parse_manifest(
            encode_json(msgspec.structs.replace(release.manifest, variants=(release.manifest.variants[0], stranger)))
        )


def test_pack_reads_the_list_and_sorts_by_demand(tmp_path, capsys):
    base = tmp_path / "out"
    base.mkdir()
    folder_of(base / "raspberry-pi-4", target="raspberry-pi-4")
    folder_of(base / "x86-64-avx2", target="x86-64-avx2", precision="int8")
    folder_of(base / "x86-64-avx512-vnni", target="x86-64-avx512-vnni", precision="int8")
    names = ("raspberry-pi-4", "x86-64-avx2", "x86-64-avx512-vnni")
    made = tuple(MadeVariant(target=name, folder=name, candidate="c", is_budget_met=True) for name in names)
    (base / "variants.json").write_bytes(encode_json(VariantList(variants=made)))
    assert main(["bundle", "keygen", "--out", str(tmp_path / "k")]) == 0
    bundle = tmp_path / "b.edgekit"
    words = [
        "bundle",
        "pack",
        str(base),
        "--name",
        "kws",
        "--version",
        "1",
        "--key",
        str(tmp_path / "k.pem"),
        "--out",
        str(bundle),
    ]
    assert main(words) == 0, capsys.readouterr().err
    assert main(["bundle", "inspect", str(bundle), "--json"]) == 0
    manifest = parse_manifest(verify_bundle(bundle, [_public(tmp_path)]).manifest_bytes)
    assert [variant.target or manifest.target for variant in manifest.variants] == [
        "x86-64-avx512-vnni",
        "x86-64-avx2",
        "raspberry-pi-4",
    ]
    assert main([*words[:-2], "--with-fp32", "--out", str(tmp_path / "c.edgekit")]) == 2


def _public(tmp_path):
    from edgekit.trust.keys import load_public_key

    return load_public_key(tmp_path / "k.pub")


@pytest.mark.parametrize("limit", ["sqnr_db>=20", "agreement>=0.5"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_never_alike(bad, limit):
    first = [np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])]
    second = [first[0], np.array([[0.0, bad]])]
    found = measure_parity(Fixed(first), Fixed(second), [{}] * 2, reference="a", contract=CONTRACT, limit=limit)
    assert not found.is_met
    assert found.sqnr_db == -200
    assert decode_json(encode_json(found), type(found)) == found  # a signed record has no infinities
    same = measure_parity(Fixed(second), Fixed(second), [{}] * 2, reference="a", contract=CONTRACT, limit=limit)
    assert same.is_met


def test_answers_out_of_silence_are_noise():
    nothing, something = [np.zeros((1, 2))], [np.ones((1, 2))]
    found = measure_parity(Fixed(nothing), Fixed(something), [{}], reference="a", contract=CONTRACT, limit="sqnr_db>=20")
    assert (found.sqnr_db, found.is_met) == (-200, False)


def test_classes_are_compared_on_the_output_of_the_same_name():
    class Two(Fixed):
        def run(self, feeds):
            return next(self.answers)

    left, right = np.array([[0.0, 1.0]]), np.array([[5.0, 0.0]])
    first, second = Two([{"y": left, "z": right}]), Two([{"z": right, "y": left}])
    assert measure_parity(first, second, [{}], reference="a", contract=CONTRACT).agreement == 1.0


def test_memory_is_asked_for_where_it_was_measured(tmp_path):
    host = HostFingerprint(
        arch="x86-64", cpu="", isa=(), cores=1, ram_mb=1, os="", python="", runtime="onnxruntime", runtime_version="1"
    )
    latency = LatencyReport(
        host=host, is_on_target=True, threads=1, warmup_runs=1, runs=9, p50_ms=1, p90_ms=1, p99_ms=1, mean_ms=1,
        p50_low_ms=1, p50_high_ms=1, noise=0.01, peak_rss_mb=68.2,
    )  # fmt: skip
    place = folder_of(tmp_path / "a", changes={"latency": latency})
    draft = draft_bundle(place, name="kws", version="1.0", open_session=open_model, created_at=BORN)
    assert draft.manifest.variants[0].requires.ram_mb == 69
    bare = draft_bundle(folder_of(tmp_path / "b"), name="kws", version="1.0", open_session=open_model, created_at=BORN)
    assert bare.manifest.variants[0].requires.ram_mb is None


def test_rules_of_the_run_count_before_the_profile(tmp_path):
    rules = Requires(runtime="onnxruntime", runtime_version="0.1", arch=("aarch64",), isa=("dotprod",))
    place = folder_of(tmp_path / "a", precision="int8")
    draft = draft_bundle(
        place, name="kws", version="1.0", open_session=open_model, profile=load_target("x86-64-avx2"), rules=rules
    )
    found = draft.manifest.variants[0].requires
    assert (found.arch, found.isa, found.isa_any) == (("aarch64",), ("dotprod",), ())
    assert found.runtime_version != "0.1"  # of the runtime that made the golden samples
