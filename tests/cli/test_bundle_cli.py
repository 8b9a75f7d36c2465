from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from releases import candidate_folder, tiny_bundle

from edgekit.bundle.reader import read_bundle
from edgekit.cli.main import main
from edgekit.monitor.sketch import count_values
from edgekit.schema.base import decode_json
from edgekit.schema.baseline import ReferenceProfile
from edgekit.trust.signer import generate_signer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Keys and a packed bundle, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    candidate_folder(folder / "out")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).uniform(-1, 1, (20, 4)).astype(np.float32))
    assert main(["bundle", "keygen", "--out", str(folder / "keys" / "publisher")]) == 0
    arguments = ["--name", "kws", "--version", "1.0.0", "--key", str(folder / "keys" / "publisher.pem")]
    out = folder / "kws-1.0.0.edgekit"
    assert main(["bundle", "pack", str(folder / "out"), *arguments, "--data", str(folder / "data.npz"), "--out", str(out)]) == 0
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_keygen_writes_a_pair_once(tmp_path, capsys):
    code, out, _ = run(capsys, "bundle", "keygen", "--out", tmp_path / "k.v1")
    assert code == 0
    assert len(out.strip()) == 64
    assert stat.S_IMODE((tmp_path / "k.v1.pem").stat().st_mode) == 0o600
    before = (tmp_path / "k.v1.pem").read_bytes()
    code, _, err = run(capsys, "bundle", "keygen", "--out", tmp_path / "k.v1.pem")
    assert code == 2
    assert "exists already" in err
    assert (tmp_path / "k.v1.pem").read_bytes() == before


def test_verify_says_who_signed(world, capsys):
    code, out, _ = run(capsys, "bundle", "verify", world / "kws-1.0.0.edgekit", "--key", world / "keys" / "publisher.pub")
    assert code == 0
    assert "kws@1.0.0 is intact" in out


@pytest.mark.parametrize("place", [0, 100, -30, -1])
def test_verify_tampered_bundle_exits_4(world, capsys, tmp_path, place):
    data = bytearray((world / "kws-1.0.0.edgekit").read_bytes())
    data[place] ^= 1
    (tmp_path / "bad.edgekit").write_bytes(data)
    code, out, err = run(capsys, "bundle", "verify", tmp_path / "bad.edgekit", "--key", world / "keys" / "publisher.pub")
    assert (code, out) == (4, "")
    assert "bad.edgekit" in err
    assert "hint:" in err


def test_verify_with_another_key_exits_4(world, capsys, tmp_path):
    run(capsys, "bundle", "keygen", "--out", tmp_path / "other")
    code, _, err = run(capsys, "bundle", "verify", world / "kws-1.0.0.edgekit", "--key", tmp_path / "other.pub")
    assert code == 4
    assert "signed by key" in err


def test_verify_without_key_or_file_is_a_usage_error(world, capsys):
    assert run(capsys, "bundle", "verify", world / "kws-1.0.0.edgekit")[0] == 2
    code, _, err = run(capsys, "bundle", "verify", "nope.edgekit", "--key", world / "keys" / "publisher.pub")
    assert code == 2
    assert "nope.edgekit" in err
    assert run(capsys, "bundle", "verify", world / "kws-1.0.0.edgekit", "--key", world / "keys" / "publisher.pem")[0] == 2


def test_inspect_is_readable_and_says_that_nobody_verified(world, capsys):
    code, out, err = run(capsys, "bundle", "inspect", world / "kws-1.0.0.edgekit")
    assert code == 0
    for word in ("kws@1.0.0", "model.onnx", "golden", "8 samples", "a, b, c", "onnxruntime >= ", "not verified"):
        assert word in out
    assert "not verified" in err
    code, out, err = run(capsys, "bundle", "inspect", world / "kws-1.0.0.edgekit", "--key", world / "keys" / "publisher.pub")
    assert "(verified)" in out
    assert err == ""


def test_inspect_json_is_the_manifest(world, capsys):
    code, out, _ = run(capsys, "bundle", "inspect", world / "kws-1.0.0.edgekit", "--json")
    manifest = json.loads(out)
    assert code == 0
    assert (manifest["name"], manifest["version"]) == ("kws", "1.0.0")


def test_pack_without_data_or_architecture_warns(world, capsys, tmp_path):
    key = world / "keys" / "publisher.pem"
    code, _, err = run(
        capsys, *("bundle", "pack", world / "out", "--name", "kws", "--version", "2", "--key", key, "--out", tmp_path / "b")
    )
    assert code == 0
    assert "--data" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--name": "Bad"}, "not a name"),
        ({"--version": "a b"}, "not a version"),
        ({"--key": "missing.pem"}, "missing.pem"),
        ({"--data": "missing.npz"}, "missing.npz"),
    ],
)
def test_pack_with_bad_arguments_exits_2(world, capsys, tmp_path, changes, words):
    given = {"--name": "kws", "--version": "1", "--key": str(world / "keys" / "publisher.pem"), "--out": str(tmp_path / "b")}
    flat = [part for pair in (given | changes).items() for part in pair]
    code, out, err = run(capsys, "bundle", "pack", world / "out", *flat)
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "b").exists()


def test_pack_without_key_hints_at_keygen(world, capsys):
    code, _, err = run(capsys, "bundle", "pack", world / "out", "--name", "kws", "--version", "1")
    assert code == 2
    assert "bundle keygen" in err


def test_pack_with_an_open_key_exits_2(world, capsys, tmp_path):
    key = tmp_path / "k.pem"
    key.write_bytes((world / "keys" / "publisher.pem").read_bytes())
    key.chmod(0o644)
    code, _, err = run(capsys, "bundle", "pack", world / "out", "--name", "kws", "--version", "1", "--key", key)
    assert code == 2
    assert "chmod 600" in err


def test_pack_can_be_made_again_byte_for_byte(world, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("a", "b"):
        key = world / "keys" / "publisher.pem"
        arguments = ["--name", "kws", "--version", "1", "--key", key, "--data", world / "data.npz", "--out", tmp_path / name]
        assert run(capsys, "bundle", "pack", world / "out", *arguments)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tiny_bundle_of_the_tests_is_a_bundle(tmp_path, capsys):
    assert run(capsys, "bundle", "inspect", tiny_bundle(tmp_path / "x.edgekit", generate_signer()))[0] == 0


def test_reference_profile_comes_from_the_packers_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out", seed=3)
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (600, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=random.integers(0, 3, 600))
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    pack = ["bundle", "pack", "out", "--name", "kws", "--key", "p.pem"]
    assert main([*pack, "--version", "1.0"]) == 0
    assert main([*pack, "--version", "1.1", "--data", "data.npz"]) == 0
    assert "below 5000" in capsys.readouterr().err
    bundle = read_bundle(Path("kws-1.1.edgekit"))
    (ref,) = [ref for ref in bundle.manifest.blobs if ref.role == "baseline"]
    profile = decode_json(bundle.blob(ref.digest), ReferenceProfile)
    assert (profile.samples, profile.classes, profile.source) == (600, 3, "data.npz")
    columns = [stream for stream in profile.streams if stream.kind == "input" and stream.axis.startswith("f")]
    assert len(columns) == 4
    for stream, column in zip(columns, x.T, strict=True):
        assert stream.counts == tuple(count_values(column.astype(np.float64), np.array(stream.edges))[:-1])
    answers = next(stream for stream in profile.streams if stream.kind == "classes")
    assert sum(answers.counts) == 600
    assert 0 < sum(answers.right) < 600
    for name, text in (("kws-1.1.edgekit", "600 samples of data.npz"), ("kws-1.0.edgekit", "devices cannot see drift")):
        assert main(["bundle", "inspect", name]) == 0
        assert text in capsys.readouterr().out
