"""The life of a release: gates, promotion, rollback, lineage; models really run, devices really look."""

from __future__ import annotations

import shutil
import threading
from datetime import timedelta

import msgspec
import numpy as np
import pytest
import uvicorn
from registry_world import NOW, Registry, slow_model, verdicts
from releases import CONTRACT, linear_model, tree_digests

from edgekit.bundle.layout import blob_name
from edgekit.cli.fleet_uses import slots_in_use, uses_of
from edgekit.cli.lineage_tree import draw, tree_of
from edgekit.errors import DeviceError, RepositoryError, UsageError
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store as FleetStore
from edgekit.fleet.writing import Received
from edgekit.repository import audit
from edgekit.repository.ceremony import repository_status, sign_pending
from edgekit.repository.gates import NOTHING_TO_COMPARE, compare_contracts, judge_drop, judge_latency, parse_gates
from edgekit.repository.lineage import DeviceUse, trace
from edgekit.repository.promotion import set_gates
from edgekit.repository.publishing import add_publisher, recall, rollback
from edgekit.repository.signatures import signed_publishers
from edgekit.repository.store import Gates, Store
from edgekit.schema.contract import InputSpec
from edgekit.schema.manifest import Requires
from edgekit.schema.measurement import EvalReport, HostFingerprint, LatencyReport
from edgekit.schema.message import Event, Reported, SlotReport
from edgekit.schema.tensor import TensorSpec
from tests.fleet.fleet_world import T0, birth, free_port, wait_until

HOST = HostFingerprint(
    arch="x86-64", cpu="cpu", isa=(), cores=2, ram_mb=1.0, os="Linux", python="3", runtime="onnxruntime", runtime_version="1"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry") / "w")
    registry.make()
    registry.publish("1.0.0")
    return registry


@pytest.fixture
def registry(template, tmp_path):
    shutil.copytree(template.folder, tmp_path / "w")
    return Registry(tmp_path / "w")


@pytest.fixture
def staged(registry):
    """Release 1.0.0 on staging; 1.1.0, with the same answers, on dev."""
    registry.promote()
    registry.publish("1.1.0")
    return registry


def latency(ratio, low, high, *, noise=0.01):
    times = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "mean_ms", "p50_low_ms", "p50_high_ms"), 1.0)
    return LatencyReport(
        host=HOST,
        is_on_target=True,
        threads=1,
        warmup_runs=1,
        runs=9,
        noise=noise,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        **times,
    )


def drop_report(drop, low, high):
    return EvalReport(
        metric="top1",
        value=0.9 - drop,
        baseline=0.9,
        drop=drop,
        is_higher_better=True,
        samples=100,
        data="sha256:" + "0" * 64,
        isa=(),
        drop_low=low,
        drop_high=high,
    )


# --- the gates themselves


def test_limits_are_read_over_those_that_hold():
    gates = parse_gates(" drop<=0.02,latency_ratio<=1.5 , publishers>=2, hours>=24", Gates())
    assert gates == Gates(max_drop=0.02, max_latency_ratio=1.5, min_publishers=2, min_hours=24)
    assert parse_gates("hours>=1", gates) == msgspec.structs.replace(gates, min_hours=1)


@pytest.mark.parametrize(
    "text", ["drop>=0.1", "publishers<=2", "publishers>=1.5", "speed<=1", "drop<=1.2.3", "drop", "drop<=-1"]
)
def test_limit_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="--gate"):
        parse_gates(text, Gates())


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (latency(1.05, 1.04, 1.06), "passed"),
        (latency(1.30, 1.20, 1.40), "failed"),
        (latency(1.30, 0.90, 1.90), "passed"),  # a tie: the interval holds 1
        (latency(1.30, 1.20, 1.40, noise=0.5), "passed"),  # a tie: inside the noise
        (latency(0.40, 0.30, 0.50), "passed"),
    ],
)
def test_latency_inside_the_noise_is_a_tie(report, verdict):
    assert judge_latency(report, Gates()).verdict == verdict


def test_drop_at_its_limit_passes_and_an_open_interval_is_said():
    assert judge_drop(drop_report(0.01, 0.0, 0.02), Gates()).verdict == "passed"
    assert "more samples" in judge_drop(drop_report(0.01, 0.0, 0.02), Gates()).reason
    assert judge_drop(drop_report(0.0101, 0.0101, 0.02), Gates()).verdict == "failed"
    assert "more samples" not in judge_drop(drop_report(0.0, -0.01, 0.01), Gates()).reason


def contract(**changes):
    return msgspec.structs.replace(CONTRACT, **changes)


X = CONTRACT.inputs[0]
Y = CONTRACT.outputs[0]
FOUR = (msgspec.structs.replace(Y, shape=("batch", 4)),)


@pytest.mark.parametrize(
    ("new", "faults", "warnings"),
    [
        (contract(), 0, 0),
        (contract(labels=("a", "c", "b")), 1, 0),
        (contract(labels=("a", "b")), 1, 0),
        (contract(labels=("a", "b", "c", "d"), outputs=FOUR), 0, 1),
        (contract(outputs=FOUR), 1, 0),
        (contract(labels=("a", "b", "c", "d")), 1, 1),
        (contract(inputs=(msgspec.structs.replace(X, dtype="uint8"),)), 1, 0),
        (contract(inputs=(msgspec.structs.replace(X, name="z"),)), 2, 0),
        (contract(inputs=(msgspec.structs.replace(X, shape=(1, 4)),)), 1, 0),
        (contract(inputs=(msgspec.structs.replace(X, shape=("n", "any")),)), 0, 0),
        (contract(inputs=(msgspec.structs.replace(X, maximum=2.0),)), 0, 1),
        (contract(inputs=(X, InputSpec(name="more", dtype="float32", shape=(1,)))), 1, 0),
        (contract(outputs=(Y, TensorSpec(name="more", dtype="float32", shape=(1,)))), 0, 1),
        (contract(outputs=(TensorSpec(name="more", dtype="float32", shape=(1,)), Y)), 1, 1),
        (contract(outputs=(msgspec.structs.replace(Y, dtype="float16"),)), 1, 0),
        (contract(outputs=()), 1, 0),
        (contract(task="other"), 1, 0),
    ],
)
def test_contract_that_changes(new, faults, warnings):
    found = compare_contracts(CONTRACT, new)
    assert (len(found.faults), len(found.warnings)) == (faults, warnings), found


# --- promotion


def test_first_release_of_a_channel_has_nothing_to_compare_with(registry):
    report = registry.promote(trial=registry.trial(data=None))
    assert report.is_passed
    assert (report.counter, report.against, report.variant) == (2, "", "fp32")
    reasons = {gate.gate: gate.reason for gate in report.gates}
    assert reasons["drop"] == reasons["latency_ratio"] == reasons["contract"] == NOTHING_TO_COMPARE
    assert "1 of 1 golden samples" in reasons["golden"]
    assert registry.seen() == {("1.0.0", "dev"): 1, ("1.0.0", "staging"): 2}


def test_release_as_good_and_as_fast_goes_on_and_the_log_says_why(staged):
    report = staged.promote("1.1.0")
    assert report.is_passed, report.gates
    assert (report.against, report.evaluation.drop, report.evaluation.samples) == ("kws@1.0.0", 0.0, 200)
    assert report.latency.ratio is not None
    assert staged.seen()["1.1.0", "staging"] == 4
    entry = audit.read_log(staged.repo)[-1]
    assert (entry.action, entry.subject, entry.details["from"]) == ("promote", "kws@1.1.0", "dev")
    assert entry.details["gate drop"].startswith("passed +0.0000")
    assert entry.details["data"] == report.evaluation.data
    made = max(repository_status(staged.repo, now=NOW).releases, key=lambda release: release.info.counter)
    assert (made.info.parent, made.manifest_digest) == ("kws@1.0.0", report.manifest)


def test_worse_release_stays_and_nothing_changes(registry):
    registry.promote()
    registry.publish("2.0.0", model=linear_model(5))
    before = tree_digests(registry.repo)
    report = registry.promote("2.0.0", skip=["latency_ratio"], reason="not now")
    assert not report.is_passed
    assert verdicts(report)["drop"] == "failed"
    assert report.evaluation.drop > 0.1
    assert report.counter is None
    assert tree_digests(registry.repo) == before


def test_slower_release_stays(registry):
    registry.promote()
    registry.publish("2.0.0", model=slow_model())
    report = registry.promote("2.0.0")
    assert [gate for gate, verdict in verdicts(report).items() if verdict == "failed"] == ["latency_ratio"]
    assert report.latency.ratio > 2


def test_release_that_fails_its_golden_samples_here_stays(registry):
    registry.publish("2.0.0", golden=np.array([[1.0, 2.0, 3.0]], np.float32))
    report = registry.promote("2.0.0")
    assert verdicts(report)["golden"] == "failed"
    assert not report.is_passed


def test_skipped_gate_needs_a_reason_that_is_written_down(registry):
    registry.promote()
    registry.publish("2.0.0", model=linear_model(5))
    with pytest.raises(UsageError) as caught:
        registry.promote("2.0.0", skip=["drop"])
    assert caught.value.code == "gate.no_reason"
    with pytest.raises(UsageError) as caught:
        registry.promote("2.0.0", skip=["dorp"], reason="x")
    assert caught.value.hint == 'Did you mean "drop"?'
    report = registry.promote("2.0.0", skip=["drop", "latency_ratio"], reason="other classes, see ticket 7")
    assert report.is_passed
    assert verdicts(report)["drop"] == "skipped"
    details = audit.read_log(registry.repo)[-1].details
    assert details["reason"] == "other classes, see ticket 7"
    assert details["gate drop"] == "skipped (other classes, see ticket 7)"


def test_dry_run_measures_and_changes_nothing(staged):
    before = tree_digests(staged.repo)
    report = staged.promote("1.1.0", is_dry_run=True)
    assert (report.is_passed, report.counter) == (True, None)
    assert tree_digests(staged.repo) == before


def test_release_is_promoted_from_the_channel_before_only(registry):
    with pytest.raises(RepositoryError) as caught:
        registry.promote(to="production")
    assert caught.value.code == "promotion.not_on_channel"
    assert "is on dev, not on staging" in caught.value.message
    for channel in ("dev", "prod"):
        with pytest.raises(UsageError) as caught:
            registry.promote(to=channel)
        assert caught.value.code == "promotion.channel"
    with pytest.raises(RepositoryError) as caught:
        registry.promote("9.9.9")
    assert caught.value.code == "repository.no_release"
    registry.promote()
    registry.promote(to="production")
    assert registry.seen() == {("1.0.0", "dev"): 1, ("1.0.0", "staging"): 2, ("1.0.0", "production"): 3}
    with pytest.raises(UsageError) as caught:
        registry.promote()
    assert caught.value.code == "promotion.nothing"


def test_direct_way_into_a_gated_channel_is_closed(registry):
    with pytest.raises(UsageError) as caught:
        registry.publish("1.1.0", channel="production")
    assert caught.value.code == "repository.gated"


def test_two_publishers_must_have_signed(registry):
    gates = Gates(min_publishers=2)
    assert verdicts(registry.promote(gates=gates))["publishers"] == "failed"
    registry.publish("1.0.0", signers=("publisher", "second"))
    assert verdicts(registry.promote(gates=gates))["publishers"] == "failed"  # the second is not trusted yet
    add_publisher(registry.repo, registry.folder / "second.pub")
    registry.publish("1.0.0", signers=("publisher", "second"))
    digest = repository_status(registry.repo, now=NOW).releases[0].manifest_digest
    assert len(signed_publishers(Store.open(registry.repo), digest)) == 2
    report = registry.promote(gates=gates)
    assert report.is_passed
    for path in (registry.repo / "publishers").glob("*.pub"):
        path.unlink()
    assert signed_publishers(Store.open(registry.repo), digest) == ()


def test_kept_signature_of_another_manifest_counts_for_nothing(registry):
    registry.publish("1.1.0")
    first, second = repository_status(registry.repo, now=NOW).releases
    folder = registry.repo / "signatures"
    names = [release.manifest_digest.removeprefix("sha256:") + ".dsse.json" for release in (first, second)]
    shutil.copy(folder / names[0], folder / names[1])
    assert verdicts(registry.promote("1.1.0"))["publishers"] == "failed"


def test_hours_on_the_channel_before(registry):
    gates = Gates(min_hours=24)
    assert verdicts(registry.promote(gates=gates, now=NOW + timedelta(hours=23)))["hours"] == "failed"
    assert registry.promote(gates=gates, now=NOW + timedelta(hours=24)).is_passed


def test_labels_in_another_order_stay(registry):
    registry.promote()
    registry.publish("2.0.0", contract=contract(labels=("b", "a", "c")))
    assert verdicts(registry.promote("2.0.0"))["contract"] == "failed"


def test_data_without_labels_compare_by_agreement(staged):
    report = staged.promote("1.1.0", trial=staged.trial(data=staged.samples(is_labelled=False)), is_dry_run=True)
    assert (report.evaluation.metric, report.evaluation.drop) == ("agreement", 0.0)


def test_comparison_without_data_is_asked_for(staged):
    with pytest.raises(UsageError) as caught:
        staged.promote("1.1.0", trial=staged.trial(data=None))
    assert caught.value.code == "promotion.no_data"


def test_blob_that_was_exchanged_is_not_measured(registry):
    release = repository_status(registry.repo, now=NOW).releases[0]
    model = next(path for path in (registry.repo / "blobs" / "sha256").iterdir() if path.read_bytes() == linear_model())
    assert release.info.name == "kws"
    model.write_bytes(linear_model(5))
    with pytest.raises(RepositoryError) as caught:
        registry.promote()
    assert caught.value.code == "repository.damaged"
    assert str(registry.repo / blob_name("sha256:" + model.name)) in caught.value.message


def test_release_that_no_variant_of_runs_here_cannot_be_measured(registry):
    from edgekit.agent.facts import probe_facts
    from edgekit.agent.plan import choose_variant

    registry.publish("2.0.0", requires=Requires(runtime="onnxruntime", arch=("riscv64",)))
    facts = probe_facts()
    with pytest.raises(DeviceError) as caught:
        registry.promote("2.0.0", trial=registry.trial(choose=lambda manifest: choose_variant(manifest, facts)))
    assert caught.value.code == "device.unsupported"


def test_recalled_release_is_not_promoted(registry):
    recall(registry.repo, "kws@1.0.0", deadline=NOW, reason="confuses a and b", now=NOW)
    with pytest.raises(RepositoryError) as caught:
        registry.promote()
    assert caught.value.code == "repository.recalled"


def test_release_that_is_over_is_not_promoted_and_validity_goes_along(registry):
    until = NOW + timedelta(days=1)
    registry.publish("1.1.0", publishing={"valid_until": until, "fallback": "abstain"})
    with pytest.raises(RepositoryError) as caught:
        registry.promote("1.1.0", now=until)
    assert caught.value.code == "promotion.expired"
    registry.promote("1.1.0")
    info = next(r.info for r in repository_status(registry.repo, now=NOW).releases if r.info.channel == "staging")
    assert (info.valid_until, info.fallback) == (until, "abstain")


def test_somebody_promotes_another_release_while_one_is_measured(staged):
    staged.publish("1.2.0")
    done = []

    def choose(manifest):
        if not done:
            done.append(staged.promote("1.2.0"))
        return manifest.variants[0]

    with pytest.raises(RepositoryError) as caught:
        staged.promote("1.1.0", trial=staged.trial(choose=choose))
    assert caught.value.code == "promotion.changed"
    assert done[0].is_passed
    assert ("1.1.0", "staging") not in staged.seen()


def test_promotion_waits_for_signatures_and_keeps_them(tmp_path):
    registry = Registry(tmp_path / "w")
    registry.make(targets=2, targets_threshold=2)
    (registry.keys / "targets-2.pem").rename(registry.folder / "far.pem")
    far = [str(registry.folder / "far.pem")]
    registry.publish("1.0.0", role_keys=far)
    report = registry.promote()
    assert (report.is_passed, report.counter, len(report.waiting)) == (True, 2, 1)
    assert registry.seen() == {("1.0.0", "dev"): 1}
    with pytest.raises(UsageError) as caught:
        registry.promote()
    assert caught.value.code == "promotion.waiting"
    sign_pending(registry.repo, keys=far, now=NOW)
    assert registry.seen() == {("1.0.0", "dev"): 1, ("1.0.0", "staging"): 2}


def test_gates_are_changed_for_good(registry):
    set_gates(registry.repo, Gates(min_hours=24), now=NOW)
    assert verdicts(registry.promote())["hours"] == "failed"
    assert registry.promote(gates=Gates()).is_passed
    entry = next(entry for entry in audit.read_log(registry.repo) if entry.action == "gates")
    assert "hours>=24" in entry.details["gates"]


# --- lineage


def test_lineage_tells_where_a_release_comes_from(staged):
    staged.promote("1.1.0")
    rollback(staged.repo, "kws", channel="staging", reason="too many false alarms", now=NOW)
    found = trace(staged.repo, "kws", "1.0.0")
    placed = {place.channel: place for place in found.placements}
    assert [(place.counter, place.is_newest) for place in (placed["dev"], placed["staging"])] == [(1, False), (5, True)]
    assert [parent.release for parent in placed["staging"].parents] == ["kws@1.1.0", "kws@1.0.0"]  # the rollback ends the chain
    assert [entry.action for entry in found.acts] == ["publish", "promote", "rollback"]
    assert len(found.publishers) == 1
    assert [variant.name for variant in found.variants] == ["fp32", "twin"]
    assert [variant.passes[0].name for variant in found.variants] == ["optimize-graph"] * 2
    assert [ref.role for ref in found.evidence] == ["card"]
    assert found.devices is None
    text = "\n".join(draw(tree_of(found)))
    for words in (
        "staging: release 5",
        "replaced kws@1.1.0 (release 4",
        "rollback by",
        "too many false alarms",
        "gate golden: passed",
        "pass optimize-graph (level=2) with onnx 1.23.2",
        "source m.onnx",
        "card: card.md",
        "ask a fleet server",
    ):
        assert words in text, words


def test_lineage_shows_a_recall(registry):
    recall(registry.repo, "kws@1.0.0", deadline=NOW, reason="confuses a and b", now=NOW)
    text = "\n".join(draw(tree_of(trace(registry.repo, "kws", "1.0.0", uses=[]))))
    assert "RECALLED 2026-11-20 12:00: confuses a and b" in text
    assert "recall by" in text
    assert "devices: 0" in text


@pytest.fixture
def fleet(tmp_path):
    """A fleet server with two devices: one runs 1.1.0 and holds 1.0.0, the other ran 1.0.0 and runs something else."""
    store = FleetStore(str(tmp_path / "fleet.db"))

    def slot(name, version, status="active"):
        return SlotReport(
            name=name,
            status=status,
            model="kws",
            version=version,
            counter=int(version[2]) + 1,
            model_digest="sha256:" + "ab" * 32,
            manifest_digest="sha256:" + "cd" * 32,
        )

    def installed(version):
        return Event(
            boot=7, seq=3, time_ms=T0, kind="install_finished", model="kws", version=version, counter=int(version[2]) + 1
        )

    reports = {
        "pi-1": (Reported(boot=7, seq=2, time_ms=T0, slots=(slot("a", "1.1.0"), slot("b", "1.0.0")), active="a"), "1.1.0"),
        "pi-2": (
            Reported(boot=7, seq=2, time_ms=T0, slots=(slot("a", "1.2.0"), SlotReport(name="b", status="empty")), active="a"),
            "1.0.0",
        ),
    }
    for device, (report, version) in reports.items():
        for message in (birth(), report, installed(version)):
            store.apply([Received(site="lab", device=device, message=message, received_ms=T0)])
    config = uvicorn.Config(make_app(store, None, token="t"), port=free_port(), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{config.port}"
    server.should_exit = True
    thread.join(10)
    store.close()


def test_devices_that_run_hold_or_ran_a_release(fleet, monkeypatch, registry):
    monkeypatch.setenv("EDGEKIT_FLEET_TOKEN", "t")
    found = uses_of(fleet, "kws", "1.0.0")
    assert [(use.device, use.use) for use in found] == [("pi-1", "holds"), ("pi-2", "ran")]
    assert [(use.device, use.use) for use in uses_of(fleet, "kws", "1.1.0")] == [("pi-1", "runs")]
    assert {(use.device, use.version) for use in slots_in_use(fleet)} == {
        ("pi-1", "1.1.0"),
        ("pi-1", "1.0.0"),
        ("pi-2", "1.2.0"),
    }
    other = DeviceUse(site="lab", device="pi-3", use="runs", model="kws", version="9", counter=9)
    lineage = trace(registry.repo, "kws", "1.0.0", uses=[*found, other])
    text = "\n".join(draw(tree_of(lineage)))
    assert "devices: 2" in text
    assert "holds  lab/pi-1" in text
