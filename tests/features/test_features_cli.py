"""The whole way by its commands: features of raw samples, a contract, a bundle, its proof, predictions of raw samples."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from edgekit.bundle.reader import read_bundle
from edgekit.cli.main import main
from edgekit.dataset.table import read_table
from edgekit.errors import ArtifactError
from edgekit.evaluation.feature_parity import prove_features
from edgekit.features.compute import compute
from edgekit.features.declaration import read_declaration
from edgekit.schema.base import decode_msgpack
from edgekit.schema.manifest import GoldenSet
from tests.features.declared import samples
from tests.releases import candidate_folder

DECLARATION = """
[stream]
name = "motor"
rate_hz = 100
time = "t"
columns = [{name = "ax", unit = "g"}, {name = "ay", unit = "g"}]

[[windows]]
name = "w"
length_s = 0.5
hop_s = 0.25

[[inputs]]
kind = "windows"
name = "x"
parts = [{window = "w", aggregates = ["mean", "rms"]}]
"""
CONTRACT = """
violation_share = 0.1
[[inputs]]
name = "x"
out_of_range = "clip"
[[inputs.columns]]
name = "w.ax.mean"
missing = "impute"
fill = 0.0
"""


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    (folder / "motor.toml").write_text(DECLARATION)
    (folder / "contract.toml").write_text(CONTRACT)
    columns = samples(1000) | {"label": np.arange(1000) // 334}
    rows = "\n".join(",".join(repr(float(value)) for value in row) for row in zip(*list(columns.values())[:3], strict=True))
    lines = [f"{row},{label}" for row, label in zip(rows.splitlines(), columns["label"], strict=True)]
    (folder / "raw.csv").write_text("t,ax,ay,label\n" + "\n".join(lines) + "\n")
    candidate_folder(folder / "out")
    assert main(["bundle", "keygen", "--out", str(folder / "key")]) == 0
    assert (
        main(["features", "compute", str(folder / "motor.toml"), str(folder / "raw.csv"), "--out", str(folder / "x.npz")]) == 0
    )
    assert main(pack_arguments(folder, "--contract", str(folder / "contract.toml"))) == 0
    return folder


def pack_arguments(folder, *more, out="motor.edgekit"):
    fixed = ["--name", "motor", "--version", "1", "--key", str(folder / "key.pem"), "--out", str(folder / out)]
    features = ["--data", str(folder / "x.npz"), "--features", str(folder / "motor.toml"), "--raw", str(folder / "raw.csv")]
    return ["bundle", "pack", str(folder / "out"), *fixed, *features, *more]


def golden_of(bundle):
    return decode_msgpack(bundle.blob(bundle.manifest.variants[0].golden), GoldenSet)


def test_features_are_written_with_labels(world, capsys):
    with np.load(world / "x.npz") as file:
        assert file["x"].shape == (39, 4)
        assert file["labels"].tolist() == sorted(file["labels"].tolist())
    code, out, _err = run(
        capsys, "features", "compute", world / "motor.toml", world / "raw.csv", "--out", world / "x.parquet", "--label", "label"
    )
    assert (code, out) == (0, "x  float32[39, 4]: w.ax.mean, w.ax.rms, w.ay.mean, w.ay.rms\n")
    table = read_table(world / "x.parquet")
    assert list(table) == ["w.ax.mean", "w.ax.rms", "w.ay.mean", "w.ay.rms", "labels"]


def test_check_proves_parity(world, capsys):
    code, out, _err = run(capsys, "features", "check", world / "motor.toml", world / "raw.csv", "--json")
    found = json.loads(out)
    assert (code, found["is_equal"], found["is_exact_elsewhere"]) == (0, True, True)
    assert {row["windows"] for row in found["rows"]} == {39}
    code, out, _err = run(capsys, "features", "check", world / "motor.toml")
    assert code == 0
    assert "equal to the last bit; on every machine" in out.replace("\n", " ")


def test_bundle_carries_features_contract_and_their_proof(world, capsys):
    bundle = read_bundle(world / "motor.edgekit")
    manifest = bundle.manifest
    assert manifest.features == read_declaration(world / "motor.toml")
    spec = manifest.contract.inputs[0]
    assert [column.name for column in spec.columns] == ["w.ax.mean", "w.ax.rms", "w.ay.mean", "w.ay.rms"]
    assert (manifest.contract.violation_share, spec.out_of_range, spec.columns[0].missing) == (0.1, "clip", "impute")
    golden = golden_of(bundle)
    proof = prove_features(manifest.features, golden)
    assert (proof.samples, proof.is_exact, proof.worst_error) == (4, True, 0.0)
    code, out, _err = run(capsys, "bundle", "inspect", world / "motor.edgekit")
    assert code == 0
    for text in (
        "motor: ax [g], ay [g] at 100 Hz",
        "w: 50 samples every 25",
        "x.w.ax.mean",
        "missing: impute",
        "4 golden features",
    ):
        assert text in out


def tampered(golden, **changes):
    return msgspec.structs.replace(golden, features=msgspec.structs.replace(golden.features, **changes))


def test_device_that_computes_otherwise_is_found_out(world):
    bundle = read_bundle(world / "motor.edgekit")
    features, golden = bundle.manifest.features, golden_of(bundle)
    first = golden.features.expected[0]
    x = first.inputs["x"]
    one_bit = msgspec.structs.replace(x, data=bytes([x.data[0] ^ 1]) + x.data[1:])
    wrong = (msgspec.structs.replace(first, inputs={"x": one_bit}), *golden.features.expected[1:])
    other_window = msgspec.structs.replace(features.windows[0], length_s=0.49)
    cases = [
        (features, tampered(golden, expected=wrong), "selftest.features"),
        (msgspec.structs.replace(features, windows=(other_window,)), golden, "selftest.features"),
        (features, tampered(golden, expected=()), "selftest.no_features"),
        (features, msgspec.structs.replace(golden, features=None), "selftest.no_features"),
    ]
    for declared, known, code in cases:
        with pytest.raises(ArtifactError) as caught:
            prove_features(declared, known)
        assert caught.value.code == code
    with pytest.raises(ArtifactError) as caught:
        prove_features(features, golden, lambda _feeds: {"y": np.full((1, 3), 9, np.float32)})
    assert caught.value.code == "selftest.mismatch"


def test_predictions_of_raw_samples_are_those_of_their_features(world, capsys):
    code, raw, err = run(capsys, "predict", world / "motor.edgekit", world / "raw.csv", "--json")
    assert (code, "39 windows of 1000 raw samples" in err) == (0, True)
    code, ready, _err = run(capsys, "predict", world / "motor.edgekit", world / "x.npz", "--json")
    assert code == 0
    assert json.loads(raw)["predictions"] == json.loads(ready)["predictions"]
    assert json.loads(raw)["score"] == json.loads(ready)["score"] is not None


def test_batch_scoring_reacts_as_the_contract_says(world, capsys, tmp_path):
    with np.load(world / "x.npz") as file:
        x = file["x"].copy()
    x[3, 0], x[5, 1] = np.nan, 1e6
    np.savez(tmp_path / "bad.npz", x=x)
    code, _out, err = run(capsys, "predict", world / "motor.edgekit", tmp_path / "bad.npz", "--json")
    assert code == 0
    assert "x.w.ax.mean: 1 missing, imputed" in err
    assert "x.w.ax.rms: 1 out of range, clipped" in err
    x[3, 2] = np.nan
    np.savez(tmp_path / "bad.npz", x=x)
    code, _out, err = run(capsys, "predict", world / "motor.edgekit", tmp_path / "bad.npz")
    assert code == 2
    assert 'column "w.ay.mean"' in err


def test_pack_refuses_features_the_model_was_not_trained_on(world, capsys, tmp_path):
    with np.load(world / "x.npz") as file:
        np.savez(tmp_path / "other.npz", x=np.nextafter(file["x"], np.float32(9)))
    arguments = pack_arguments(world, "--data", str(tmp_path / "other.npz"), out="refused.edgekit")
    code, _out, err = run(capsys, *arguments)
    assert code == 2
    assert "39 of 39 windows of --raw differ from --data" in err
    assert not (world / "refused.edgekit").exists()


def test_pack_refuses_features_that_do_not_fit_the_model(world, capsys, tmp_path):
    (tmp_path / "wide.toml").write_text(DECLARATION.replace('"rms"', '"rms", "max"'))
    code, _out, err = run(capsys, *pack_arguments(world, "--features", str(tmp_path / "wide.toml")))
    assert code == 2
    assert "the features make float32[batch, 6], the model takes float32[batch, 4]" in err


def test_printed_contract_is_a_start(world, capsys, tmp_path):
    code, out, _err = run(
        capsys, "bundle", "contract", world / "out", "--data", world / "x.npz", "--features", world / "motor.toml"
    )
    assert code == 0
    assert 'name = "w.ay.rms"' in out
    (tmp_path / "contract.toml").write_text(out)
    assert run(capsys, *pack_arguments(world, "--contract", str(tmp_path / "contract.toml"), out="again.edgekit"))[0] == 0
    code, shown, _err = run(capsys, "bundle", "contract", world / "again.edgekit")
    assert (code, shown) == (0, out)


def test_rules_are_amended_without_the_weights(world, capsys, tmp_path):
    (tmp_path / "contract.toml").write_text('[[inputs]]\nname = "x"\nout_of_range = "reject"\n')
    arguments = ["--version", "2", "--key", world / "key.pem", "--contract", tmp_path / "contract.toml"]
    out = world / "amended.edgekit"
    assert run(capsys, "bundle", "amend", world / "motor.edgekit", *arguments, "--out", out)[0] == 0
    old, new = read_bundle(world / "motor.edgekit").manifest, read_bundle(out).manifest
    assert new.contract.inputs[0].out_of_range == "reject"
    assert new.contract.inputs[0].columns == old.contract.inputs[0].columns
    assert (new.features, new.variants) == (old.features, old.variants)
    (tmp_path / "contract.toml").write_text("")
    code, _stdout, err = run(capsys, "bundle", "amend", world / "motor.edgekit", *arguments, "--out", world / "same.edgekit")
    assert (code, "has these labels, thresholds and input rules" in err) == (2, True)


def test_bits_do_not_depend_on_the_file(world):
    features = read_declaration(world / "motor.toml")
    columns = samples(1000)
    assert (
        compute(columns, features).inputs["x"].tobytes()
        == compute(read_table(world / "raw.csv"), features).inputs["x"].tobytes()
    )
