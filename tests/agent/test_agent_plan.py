"""The plan: pure functions, so every question is asked directly."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.agent.health import CRASH_WINDOW_S, CrashLedger
from edgekit.agent.plan import (
    MAX_REFUSALS,
    DeviceFacts,
    active_slot,
    backoff_s,
    choose_release,
    choose_variant,
    make_plan,
    needed_blobs,
    other_slot,
    parse_version,
    refuse,
)
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.manifest import Requires
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.schema.state import AgentState, Floors, Refusal, Slot

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def digest(number):
    return "sha256:" + f"{number:064x}"


def release(counter, *, manifest=None, name="m", channel="production"):
    manifest = counter if manifest is None else manifest
    info = ReleaseInfo(
        name=name, version=f"{manifest}.0", channel=channel, counter=counter, published_at=NOW, installed_bytes=1, runtimes=()
    )
    path = f"models/{name}/{manifest}.0/manifest.json"
    return Release(info=info, manifest_path=path, manifest_digest=digest(manifest), manifest_size_bytes=1)


def refusal(manifest):
    return Refusal(model="m", version="1", counter=1, manifest=digest(manifest), code="c", reason="r", at=NOW)


def slot(name, counter, status, *, manifest=None):
    manifest = counter if manifest is None else manifest
    return Slot(name=name, status=status, model="m", version=f"{manifest}.0", counter=counter, manifest=digest(manifest))


def state(a=None, b=None, *, active=None, floor=0, refused=()):
    return AgentState(
        device="d",
        slots=(a or Slot(name="a"), b or Slot(name="b")),
        active=active,
        floors=Floors(releases={"m": floor} if floor else {}),
        refusals=tuple(refusal(number) for number in refused),
    )


def choose(current, *releases, deferred=()):
    found = choose_release(current, releases, model="m", channel="production", deferred=deferred)
    return found.info.counter if found else None


def plan_of(current, *releases):
    return make_plan(current, releases, model="m", channel="production")


def test_newest_release_chosen():
    assert choose(state(), release(1), release(3), release(2)) == 3


def test_other_model_and_other_channel_ignored():
    assert choose(state(), release(9, name="n"), release(8, channel="dev"), release(1)) == 1


def test_refused_release_skipped_for_the_next_best():
    assert choose(state(refused=[3]), release(2), release(3)) == 2


def test_release_below_floor_never_chosen():
    assert choose(state(slot("a", 5, "active"), active="a", floor=5), release(4)) is None


def test_active_release_not_chosen_again():
    assert choose(state(slot("a", 5, "active"), active="a", floor=5), release(5)) is None


def test_release_at_the_floor_chosen_again_when_no_slot_serves_it():
    assert choose(state(slot("a", 4, "active"), active="a", floor=5), release(4), release(5)) == 5


def test_deferred_release_waits():
    assert choose(state(), release(1), release(2), deferred={digest(2)}) == 1


def test_first_installation_takes_every_step():
    plan = plan_of(state(), release(1))
    assert plan.steps == ("fetch", "stage", "verify", "selftest", "switch", "report")
    assert plan.slot in {"a", "b"}


def test_installation_goes_into_the_slot_that_does_not_serve():
    assert plan_of(state(slot("a", 1, "active"), active="a", floor=1), release(2)).slot == "b"
    assert plan_of(state(None, slot("b", 1, "active"), active="b", floor=1), release(2)).slot == "a"


def test_verified_slot_needs_no_download():
    current = state(slot("a", 1, "active"), slot("b", 2, "verified"), active="a", floor=1)
    assert plan_of(current, release(2)).steps == ("verify", "selftest", "switch", "report")


def test_rollback_release_uses_the_good_slot():
    current = state(slot("a", 2, "active"), slot("b", 1, "good"), active="a", floor=2)
    plan = plan_of(current, release(2), release(3, manifest=1))
    assert (plan.slot, plan.steps) == ("b", ("verify", "selftest", "switch", "report"))


def test_half_built_slot_is_built_again():
    current = state(slot("a", 1, "active"), slot("b", 2, "staging"), active="a", floor=1)
    assert plan_of(current, release(2)).steps[0] == "fetch"


def test_republished_manifest_raises_the_counter_only():
    current = state(slot("a", 1, "active"), active="a", floor=1)
    plan = plan_of(current, release(4, manifest=1))
    assert (plan.slot, plan.steps) == ("a", ("switch", "report"))


releases_strategy = st.lists(st.builds(release, st.integers(1, 6), manifest=st.integers(1, 6)), max_size=6)
slots_strategy = st.tuples(st.integers(1, 6), st.sampled_from(["staging", "verified", "good", "bad"]))


@given(
    releases=releases_strategy,
    active=st.integers(1, 6),
    other=slots_strategy,
    floor=st.integers(1, 6),
    refused=st.sets(st.integers(1, 6)),
)
def test_plan_is_idempotent_and_never_goes_below_the_floor(releases, active, other, floor, refused):
    current = state(slot("a", active, "active"), slot("b", *other), active="a", floor=floor, refused=refused)
    plan = plan_of(current, *releases)
    if plan is None:
        return
    assert plan.release.info.counter >= max(floor, active)
    assert plan.release.manifest_digest not in {digest(number) for number in refused}
    assert plan.slot == "b" or plan.steps == ("switch", "report")
    assert plan_of(current, *releases) == plan
    done = slot(plan.slot, plan.release.info.counter, "active", manifest=int(plan.release.manifest_digest[-2:], 16))
    slots = tuple(done if old.name == plan.slot else old for old in current.slots)
    floors = Floors(releases={"m": plan.release.info.counter})
    assert plan_of(msgspec.structs.replace(current, slots=slots, active=plan.slot, floors=floors), *releases) is None


def test_refusals_bounded_and_one_a_manifest():
    current = state(refused=range(MAX_REFUSALS))
    kept = refuse(current, refusal(MAX_REFUSALS))
    assert len(kept) == MAX_REFUSALS
    assert kept[-1].manifest == digest(MAX_REFUSALS)
    assert len(refuse(current, refusal(5))) == MAX_REFUSALS


def facts(**changes):
    base = DeviceFacts(
        arch="aarch64", cpu="c", isa=("neon",), cores=4, ram_mb=900, os="Linux", runtimes={"onnxruntime": "1.24.1"}
    )
    return msgspec.structs.replace(base, **changes)


@pytest.mark.parametrize(
    ("requires", "word"),
    [
        (Requires(runtime="litert"), "needs litert"),
        (Requires(runtime="onnxruntime", runtime_version="1.30"), "1.30 or newer"),
        (Requires(runtime="onnxruntime", arch=("x86-64",)), "needs x86-64"),
        (Requires(runtime="onnxruntime", isa=("neon", "i8mm")), "needs i8mm"),
        (Requires(runtime="onnxruntime", ram_mb=1024), "1024 MB"),
    ],
)
def test_unsupported_variant_says_why(requires, word, make_manifest):
    manifest = make_manifest(requires=[requires])
    with pytest.raises(DeviceError, match=word) as caught:
        choose_variant(manifest, facts())
    assert caught.value.code == "device.unsupported"


def test_first_fitting_variant_chosen(make_manifest):
    manifest = make_manifest(requires=[Requires(runtime="litert"), Requires(runtime="onnxruntime", runtime_version="1.24")])
    assert choose_variant(manifest, facts()).name == "v1"


def test_missing_blob_found(make_manifest):
    manifest = make_manifest(requires=[Requires(runtime="onnxruntime")])
    with pytest.raises(ArtifactError, match="does not list"):
        needed_blobs(msgspec.structs.replace(manifest, blobs=()), manifest.variants[0])


@pytest.mark.parametrize(("text", "numbers"), [("1.24.1", (1, 24, 1)), ("1.9", (1, 9)), ("2.0rc1", (2, 0)), ("", ())])
def test_versions_compare_as_numbers(text, numbers):
    assert parse_version(text) == numbers


@given(failures=st.integers(1, 10_000), draw=st.floats(0, 1, exclude_max=True))
def test_backoff_bounded(failures, draw):
    assert 0 <= backoff_s(failures, base_s=2, cap_s=60, draw=lambda: draw) <= 60


def test_single_crash_restarts_at_once_and_three_are_a_loop():
    ledger = CrashLedger()
    ledger.note(0)
    assert (ledger.delay_s, ledger.is_looping) == (0, False)
    ledger.note(1)
    assert (ledger.delay_s, ledger.is_looping) == (1, False)
    ledger.note(2)
    assert ledger.is_looping
    ledger.note(3 + CRASH_WINDOW_S * 2)
    assert (ledger.delay_s, ledger.is_looping, ledger.total) == (0, False, 4)


def test_slots_by_role():
    current = state(slot("a", 1, "good"), slot("b", 2, "active"), active="b")
    assert active_slot(current).name == "b"
    assert other_slot(current).name == "a"
    assert active_slot(state()) is None
