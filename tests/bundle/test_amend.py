"""Amended releases: other words, the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from releases import BORN, CONTRACT, candidate_folder, tiny_bundle

from edgekit.bundle.amend import amend_bundle, amend_contract
from edgekit.bundle.provenance.intent import Intent, intent_of
from edgekit.bundle.reader import parse_manifest, read_bundle, verify_bundle
from edgekit.bundle.writer import write_bundle
from edgekit.cli.main import main
from edgekit.errors import EdgekitError
from edgekit.schema.base import encode_json
from edgekit.trust.signer import generate_signer


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture
def bundle(tmp_path, signer):
    return read_bundle(tiny_bundle(tmp_path / "kws-1.0.0.edgekit", signer))


def refusal(call, *arguments, **more) -> EdgekitError:
    with pytest.raises(EdgekitError) as caught:
        call(*arguments, **more)
    return caught.value


def test_weights_and_candidate_stay(tmp_path, bundle, signer):
    draft = amend_bundle(
        bundle, version="1.0.1", folder=tmp_path, labels=("x", "y", "z"), thresholds={"y": 0.5}, created_at=BORN
    )
    path = write_bundle(draft.manifest, draft.blobs, signer=signer, out=tmp_path / "new.edgekit")
    new = verify_bundle(path, [signer.public_key]).manifest
    old = bundle.manifest
    assert (new.version, new.contract.labels, new.contract.thresholds) == ("1.0.1", ("x", "y", "z"), {"y": 0.5})
    assert (new.blobs, new.variants, new.candidate) == (old.blobs, old.variants, old.candidate)
    assert new.candidate.contract.labels == ("a", "b", "c")
    assert (new.contract.inputs, new.contract.outputs) == (old.contract.inputs, old.contract.outputs)


def test_threshold_stays_with_its_class():
    once = amend_contract(CONTRACT, None, {"a": 0.5, "b": 0.25})
    swapped = amend_contract(once, ("b", "x", "a"), {})
    assert swapped.thresholds == {"b": 0.5, "x": 0.25}
    less = amend_contract(swapped, None, {"x": None, "a": 1.0})
    assert less.thresholds == {"b": 0.5, "a": 1.0}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"labels": ("a", "b")}, "amend.labels"),
        ({"labels": ("a", "b", "b")}, "amend.labels"),
        ({"labels": ("a", "b", " ")}, "amend.labels"),
        ({"thresholds": {"q": 0.5}}, "amend.threshold"),
        ({"labels": ("x", "y", "z"), "thresholds": {"a": 0.5}}, "amend.threshold"),
        ({"thresholds": {"a": 1.5}}, "amend.threshold"),
        ({"thresholds": {"a": float("nan")}}, "amend.threshold"),
        ({}, "amend.nothing"),
        ({"labels": ("a", "b", "c"), "thresholds": {"a": None}}, "amend.nothing"),
        ({"version": "1.0.0", "thresholds": {"a": 0.5}}, "amend.version"),
        ({"version": "no version", "thresholds": {"a": 0.5}}, "amend.version"),
    ],
)
def test_amendment_that_cannot_be_refused(tmp_path, bundle, change, code):
    assert refusal(amend_bundle, bundle, **({"version": "2", "folder": tmp_path} | change)).code == code


def test_number_of_classes_known_from_the_output_where_there_are_no_labels():
    nameless = msgspec.structs.replace(CONTRACT, labels=())
    assert amend_contract(nameless, ("p", "q", "r"), {"q": 0.5}).thresholds == {"q": 0.5}
    assert refusal(amend_contract, nameless, ("p", "q"), {}).code == "amend.labels"


def test_threshold_for_no_label_refused_by_the_reader(bundle):
    contract = msgspec.structs.replace(CONTRACT, thresholds={"nobody": 0.5})
    data = encode_json(msgspec.structs.replace(bundle.manifest, contract=contract))
    assert "nobody" in refusal(parse_manifest, data).message


def test_amend_on_the_command_line_and_predict_says_what_does_not_count(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    (tmp_path / "labels.txt").write_text("fish\ncat\n\ndog\n")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).uniform(-1, 1, (200, 4)).astype(np.float32))
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    assert main(["bundle", "pack", "out", "--name", "kws", "--version", "1.0", "--key", "p.pem"]) == 0
    amend = ["bundle", "amend", "kws-1.0.edgekit", "--version", "1.1"]
    assert main([*amend, "--labels", "labels.txt"]) == 2
    amend += ["--key", "p.pem"]
    assert main([*amend, "--labels", "labels.txt", "--threshold", "cat=high"]) == 2
    assert main([*amend, "--labels", "labels.txt", "--threshold", "cat=0.6", "--threshold", "dog=0"]) == 0
    assert main(["bundle", "verify", "kws-1.1.edgekit", "--key", "p.pub"]) == 0
    capsys.readouterr()
    assert main(["bundle", "inspect", "kws-1.1.edgekit"]) == 0
    assert "cat 0.6, dog 0" in capsys.readouterr().out
    assert main(["predict", "kws-1.1.edgekit", "data.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert {one["label"]: one["threshold"] for one in found} == {"cat": 0.6, "dog": 0.0}
    below = sum(one["label"] == "cat" and one["confidence"] < 0.6 for one in found)
    assert 0 < below < sum(one["label"] == "cat" for one in found)  # both sides of the threshold occur
    assert main(["predict", "kws-1.1.edgekit", "data.npz"]) == 0
    shown = capsys.readouterr().out
    assert f"{below} below the threshold of their label" in shown
    assert "cat (below threshold 0.6)" in shown
    assert sorted(path.name for path in tmp_path.glob(".edgekit*")) == []


def test_evidence_is_of_the_new_release(tmp_path, capsys, monkeypatch, signer):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    assert main(["bundle", "keygen", "--out", "oms", "--scheme", "ecdsa-p256"]) == 0
    keys = ["--key", "p.pem", "--oms-key", "oms.pem"]
    assert main(["bundle", "pack", "out", "--name", "kws", "--version", "1.0", *keys]) == 0
    old = read_bundle(tmp_path / "kws-1.0.edgekit")
    assert main(["bundle", "amend", "kws-1.0.edgekit", "--version", "1.1", "--threshold", "a=0.5", *keys]) == 0
    new = read_bundle(tmp_path / "kws-1.1.edgekit")
    assert {ref.path for ref in new.manifest.blobs} == {ref.path for ref in old.manifest.blobs}
    assert main(["bundle", "verify", "kws-1.1.edgekit", "--key", "p.pub", "--oms-key", "oms.pub"]) == 0
    capsys.readouterr()
    assert main(["bundle", "amend", "kws-1.0.edgekit", "--version", "1.2", "--threshold", "a=0.5", "--key", "p.pem"]) == 0
    assert "--oms-key" in capsys.readouterr().err
    bare = amend_bundle(old, version="1.3", folder=tmp_path, thresholds={"a": 0.5})
    assert {ref.role for ref in bare.manifest.blobs} == {"model", "golden", "candidate", "report"}
    assert set(bare.blobs) == {ref.digest for ref in bare.manifest.blobs}


def test_words_of_the_owner_stay_until_new_ones_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    Path("card.toml").write_text('intended_use = ["Doors of lifts."]\nowner = "Line team"\n')
    Path("other.toml").write_text('owner = "Night shift"\n')
    pack = ["bundle", "pack", "out", "--name", "kws", "--version", "1.0", "--key", "p.pem", "--card", "card.toml"]
    assert main(pack) == 0
    amend = ["bundle", "amend", "kws-1.0.edgekit", "--threshold", "a=0.5", "--key", "p.pem"]
    assert main([*amend, "--version", "1.1"]) == 0
    assert main([*amend, "--version", "1.2", "--card", "other.toml"]) == 0
    kept, changed = read_bundle(Path("kws-1.1.edgekit")), read_bundle(Path("kws-1.2.edgekit"))
    assert intent_of(kept) == Intent(intended_use=("Doors of lifts.",), owner=("Line team",))
    assert intent_of(changed) == Intent(owner=("Night shift",))
    cards = [next(ref for ref in each.manifest.blobs if ref.path == "card.md") for each in (kept, changed)]
    assert b"Doors of lifts." in kept.blob(cards[0].digest)
    assert b"Doors of lifts." not in changed.blob(cards[1].digest)


def test_predict_opens_a_sealed_bundle_with_its_identity(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32))
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    assert main(["bundle", "keygen", "--out", "d", "--scheme", "age"]) == 0
    pack = ["bundle", "pack", "out", "--name", "kws", "--key", "p.pem"]
    assert main([*pack, "--version", "1.0"]) == 0
    assert main([*pack, "--version", "1.1", "--recipient", "@d.age.pub"]) == 0
    assert main(["bundle", "amend", "kws-1.1.edgekit", "--version", "1.2", "--key", "p.pem", "--threshold", "a=0"]) == 0
    capsys.readouterr()
    assert main(["predict", "kws-1.2.edgekit", "data.npz"]) == 3
    assert "age_identity" in capsys.readouterr().err
    answers = []
    for arguments in (["kws-1.0.edgekit"], ["kws-1.2.edgekit", "--identity", "d.age"]):
        assert main(["predict", arguments[0], "data.npz", *arguments[1:], "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    plain, sealed = answers
    assert plain["model_digest"] == sealed["model_digest"]
    assert [one["values"] for one in plain["predictions"]] == [one["values"] for one in sealed["predictions"]]
