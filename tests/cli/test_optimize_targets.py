"""``edgekit optimize`` for several targets: one folder each, one list, nothing made twice, and what pack makes of it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.reader import read_bundle
from edgekit.cli.main import main
from edgekit.compiler import pipeline
from edgekit.compiler.passes.on_onnx.optimize import OptimizeGraph
from edgekit.compiler.passes.registry import all_passes
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.target import TargetProfile
from edgekit.schema.variants import VariantList

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compiler"))
from small_graphs import convolutional, images, save

VNNI, AVX2 = "x86-64-avx512-vnni", "x86-64-avx2"


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02, "default": 0.02, "max": 0.02})


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(convolutional(channels=16), tmp_path / "net.onnx")
    labels = np.random.default_rng(0).integers(0, 4, 40)
    np.savez(tmp_path / "data.npz", **images(40), labels=labels)
    return tmp_path


def call(*arguments: str, targets: tuple[str, ...] = (VNNI, AVX2)) -> int:
    named = [word for target in targets for word in ("--target", target)]
    common = ["--data", "data.npz", "--effort", "fast", "--budget", "top1_drop<=0.9", "--quiet"]
    return main(["optimize", "net.onnx", *named, *common, *arguments])


def own_profile(place: Path, name: str, *, flash_mb: float = 100.0) -> str:
    """A target of one's own, in a file that only this machine has."""
    text = (Path(__file__).resolve().parents[2] / "targets" / f"{VNNI}.toml").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("name ="))
    path = place / f"{name}.toml"
    path.write_text(f'name = "{name}"\nflash_mb = {flash_mb}\n{body}\n')
    return str(path)


def models_of(folder: Path) -> dict[str, str]:
    """Digest of each candidate's model by name; the chosen one lies in the folder itself."""
    records = [decode_json(path.read_bytes(), Candidate) for path in folder.glob("**/candidate.json")]
    return {record.name: record.artifact.digest for record in records if record.artifact is not None}


def listed(folder: Path) -> VariantList:
    return decode_json((folder / "variants.json").read_bytes(), VariantList)


def test_each_target_has_a_folder_like_that_of_a_single_run(place, capsys):
    assert call("--out", "all") == 0
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith(VNNI) and line.endswith("met") for line in table)
    assert "edgekit bundle pack all" in table[-1]
    assert call("--out", "single", targets=(AVX2,)) == 0
    ours, alone = place / "all" / AVX2, place / "single"
    assert {path.name for path in ours.iterdir()} == {path.name for path in alone.iterdir()} - {".work"}
    models = [models_of(folder) for folder in (ours, alone)]
    for name in ("fp32", "fp32-optimized", "int8-per-channel"):
        assert models[0][name] == models[1][name], name
    assert decode_json((ours / "candidate.json").read_bytes(), Candidate).target == AVX2


def test_list_has_order_candidate_and_rules(place, capsys):
    assert call("--json", "--out", "all", targets=(AVX2, VNNI, "raspberry-pi-4")) == 0
    made = listed(place / "all").variants
    assert [item.target for item in made] == [AVX2, VNNI, "raspberry-pi-4"]
    assert [record.name for record in decode_json(capsys.readouterr().out, list[Candidate])] == [
        item.candidate for item in made
    ]
    for item in made:
        record = decode_json((place / "all" / item.folder / "candidate.json").read_bytes(), Candidate)
        assert item.candidate == record.name
        if record.artifact.precision.startswith("int8"):
            rules = {AVX2: (("avx2",), ()), VNNI: ((), ("avx512_vnni", "avx_vnni")), "raspberry-pi-4": ((), ())}[item.target]
            assert (item.requires.isa, item.requires.isa_any) == rules


def test_what_is_the_same_for_both_targets_is_made_once(place, monkeypatch):
    runs = []
    original = OptimizeGraph.run
    monkeypatch.setattr(OptimizeGraph, "run", lambda self, *given: runs.append(1) or original(self, *given))
    assert call("--out", "all") == 0
    assert len(runs) == 1
    steps = [json.loads(path.read_text())["path"] for path in (place / "all" / ".work" / "steps").glob("*/step.json")]
    assert sorted(steps).count("import-onnx.onnx") == 1
    assert sorted(steps).count("quantize-static.onnx") == 2  # 8 and 7 bits: that is not the same
    assert not (place / "all" / VNNI / ".work").exists()


class Watched:
    """A profile that notes what is read of it."""

    def __init__(self, profile: TargetProfile) -> None:
        self.profile, self.read = profile, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.profile, name)


def test_passes_read_nothing_of_the_target_but_what_they_say(place, monkeypatch):
    seen: dict[str, set[str]] = {}

    def watch(kind):
        original = kind.run

        def run(self, model, context):
            watched = Watched(context.target)
            try:
                return original(self, model, replace(context, target=watched))
            finally:
                seen.setdefault(self.name, set()).update(watched.read - set(self.target_fields))

        monkeypatch.setattr(kind, "run", run)

    for spec in all_passes():
        if spec.where.startswith("on_onnx"):
            watch(spec_class(spec))
    call("--out", "one", "--effort", "default", targets=(AVX2,))
    assert {"import-onnx", "optimize-graph", "quantize-static", "quantize-dynamic", "halve-weights"} <= seen.keys()
    assert not {name: extra for name, extra in seen.items() if extra}


def spec_class(spec):
    module, _, name = spec.where.partition(":")
    return getattr(importlib.import_module(f"edgekit.compiler.passes.{module}"), name)


def test_exit_1_when_one_target_misses_and_the_list_says_which(place, capsys):
    small = own_profile(place, "tiny-board", flash_mb=0.0001)
    assert call("--out", "all", targets=(AVX2, small)) == 1
    assert {item.target: item.is_budget_met for item in listed(place / "all").variants} == {AVX2: True, "tiny-board": False}
    assert any(line.startswith("tiny-board") and line.endswith("missed") for line in capsys.readouterr().out.splitlines())


def test_dry_run_prints_one_list_and_writes_nothing(place, capsys):
    assert call("--dry-run", "--json", "--out", "all") == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["target"] for plan in plans] == [VNNI, AVX2]
    assert all("int8-per-channel" in [item["name"] for item in plan["candidates"]] for plan in plans)
    assert not (place / "all").exists()


def test_target_named_twice(place, capsys):
    assert call(targets=(AVX2, AVX2)) == 2
    assert "named twice" in capsys.readouterr().err


def test_interrupted_at_the_second_target_goes_on_from_there(place, monkeypatch, capsys):
    made = []
    judge = pipeline.judge

    def interrupted(*given, **named):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return judge(*given, **named)

    monkeypatch.setattr(pipeline, "judge", interrupted)
    assert call("--out", "all") == 130
    assert "all/.work" in capsys.readouterr().err
    assert (place / "all" / VNNI / "model.onnx").is_file()
    assert not (place / "all" / "variants.json").exists()
    steps = set((place / "all" / ".work" / "steps").iterdir())
    assert call("--out", "all") == 0
    assert set((place / "all" / ".work" / "steps").iterdir()) >= steps
    assert [item.target for item in listed(place / "all").variants] == [VNNI, AVX2]


def test_previous_of_several_targets_is_each_ones_own(place, capsys):
    assert call("--out", "old") == 0
    capsys.readouterr()
    assert call("--out", "new", "--previous", "old", targets=(VNNI, "raspberry-pi-4")) in (0, 2)
    err = capsys.readouterr().err
    assert "no variant for raspberry-pi-4" in err


def test_pack_takes_the_rules_of_a_target_that_only_the_run_knew(place, capsys):
    assert call("--out", "all", targets=(own_profile(place, "our-board"), "raspberry-pi-4")) == 0
    (place / "our-board.toml").unlink()
    rules = {item.target: item.requires for item in listed(place / "all").variants}
    assert main(["bundle", "keygen", "--out", "k"]) == 0
    words = ["bundle", "pack", "all", "--name", "net", "--version", "1", "--key", "k.pem", "--data", "data.npz"]
    assert main([*words, "--out", "net.edgekit", "--parity", "agreement>=0"]) == 0, capsys.readouterr().err
    manifest = read_bundle(place / "net.edgekit").manifest
    found = {variant.target or manifest.target: variant.requires for variant in manifest.variants}
    assert found["our-board"].arch == rules["our-board"].arch
    assert found["our-board"].isa_any == rules["our-board"].isa_any
    assert "no such profile" not in capsys.readouterr().err
