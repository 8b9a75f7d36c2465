"""Probation: judged by pure functions, kept over restarts, ended by one write."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import msgspec
import pytest

from edgekit.agent.board import Board, Tally, WatchedSession, p95
from edgekit.agent.child import SelfTestFailed
from edgekit.agent.config import AgentConfig, ProbationConfig
from edgekit.agent.hosting import Hosting
from edgekit.agent.journal import Journal
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import MAX_ATTEMPTS, MAX_INTERRUPTIONS, active_slot, contract_changes, other_slot
from edgekit.agent.probation import add, begin, judge
from edgekit.agent.state_store import StateStore
from edgekit.agent.units import Unit
from edgekit.errors import DataError, DeviceError
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.manifest import Requires
from edgekit.schema.state import Probation
from edgekit.schema.tensor import TensorSpec
from edgekit.telemetry.codec import decode
from tests.agent.test_agent_state import FACTS, Bench
from tests.agent.test_agent_updater import Round

LIMITS = ProbationConfig(inferences=100, seconds=60, max_crashes=1, max_starts=3)
TRIAL = Probation(slot="b", manifest="sha256:" + "2" * 64, counter=2)


def trial(**changes):
    return msgspec.structs.replace(TRIAL, **changes)


def verdict(found, *, recent=(), limits=LIMITS):
    judged = judge(found, limits, recent_ms=recent)
    return judged.code or judged.kind


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "wait"),
        ({"inferences": 99}, "wait"),
        ({"inferences": 100}, "commit"),
        ({"inferences": 102, "failures": 3}, "wait"),
        ({"inferences": 103, "failures": 3}, "commit"),
        ({"served_s": 60.0}, "commit"),
        ({"inferences": 1000, "crashes": 1}, "commit"),
        ({"inferences": 1000, "crashes": 2}, "probation.crashes"),
        ({"starts": 3}, "wait"),
        ({"starts": 4}, "probation.boot_loop"),
        ({"inferences": 50, "failures": 3}, "probation.failures"),
        ({"inferences": 2, "failures": 2}, "wait"),
        ({"inferences": 200, "bad_outputs": 1}, "probation.bad_outputs"),
    ],
)
def test_probation_judged(changes, expected):
    assert verdict(trial(**changes)) == expected


def test_slower_than_the_model_before():
    slow = trial(baseline_ms=10.0)
    assert verdict(slow, recent=[60.0] * 50) == "probation.latency"
    assert verdict(slow, recent=[49.0] * 50) == "wait"
    assert verdict(slow, recent=[60.0] * 49) == "wait"  # too few to know
    assert verdict(slow, recent=[9.0] * 90 + [500.0] * 10) == "wait"  # something else took the processor for a moment
    assert verdict(trial(baseline_ms=0.1), recent=[9.0] * 50) == "wait"  # a moment's noise
    assert verdict(trial(), recent=[1e6] * 50) == "wait"  # nothing to compare with


def test_latency_before_taken_from_enough_answers():
    assert begin(TRIAL, [1.0] * 49).baseline_ms == 0
    assert begin(TRIAL, [1.0] * 95 + [5.0] * 5).baseline_ms == 5.0
    assert p95([]) == 0


def test_tallies_add_up_over_workers():
    once = add(TRIAL, Tally(inferences=10, failures=1, bad_outputs=2), served_s=3.0)
    twice = add(once, Tally(inferences=5), served_s=1.0)
    assert (twice.inferences, twice.failures, twice.bad_outputs, twice.served_s) == (15, 1, 2, 4.0)


def test_board_read_from_outside_says_whose_work_it_is():
    board = Board.create(2)
    theirs = Board(board.descriptor, 2)

    class Session:
        inputs = "the session's own"

        def run(self, feeds):
            assert board.running() == (1,)
            raise feeds

    watched = WatchedSession(Session(), theirs.page(1))
    for error in (DataError("data.shape", "client"), RuntimeError("ours")):
        with pytest.raises(type(error)):
            watched.run(error)
    assert watched.inputs == "the session's own"
    assert board.running() == ()
    assert board.page(1).tally == Tally(inferences=1, failures=1)  # a client's mistake counts for nothing
    theirs.page(0).enter()
    theirs.page(0).leave(2.5, is_failed=False)
    theirs.page(0).note_bad_output()
    assert board.page(0).tally == Tally(inferences=1, bad_outputs=1)
    assert list(board.page(0).recent_ms) == [2.5]


# --- a unit over a real state folder


class Trial:
    """A unit whose releases are installed by the bench, and a board that plays its worker."""

    def __init__(self, folder, **settings):
        self.bench = Bench(folder, **({"probation": LIMITS} | settings))
        self.journal = Journal(
            Outbox(folder / "outbox.db", max_bytes=1 << 20), AgentConfig(device="d", broker="mqtt://127.0.0.1:1"), "0"
        )
        self.reports = []
        self.board = Board.create(1)
        self.open()

    def open(self):
        """As after a restart of the agent."""
        bench = self.bench
        bench.store = StateStore.open(bench.folder, device="d")
        bench.installer._store = bench.store
        self.unit = Unit(bench.config, bench.store, bench.slots, self.journal, self, b"")
        self.unit.recover()

    known_facts = FACTS

    async def ask_facts(self):
        return FACTS

    def report(self):
        self.reports.append(1)

    @property
    def state(self):
        return self.bench.store.state

    def install(self, counter):
        self.bench.shelf.publish(counter)
        self.bench.install()
        self.serve()

    def serve(self):
        """A worker begins."""
        self.board = Board.create(1)
        model = asyncio.run(self.unit.wanted())
        self.unit.begin_serving(model, None, self.board.page(0), (), time.monotonic())

    def answer(self, count, *, is_failed=False):
        for _ in range(count):
            self.board.page(0).enter()
            self.board.page(0).leave(1.0, is_failed=is_failed)

    def watch(self, after=0.0):
        return self.unit.watch(time.monotonic() + after)

    def events(self):
        rows = self.journal.outbox.read(kinds=("ev",), limit=1000)
        return [(found.kind, found.code) for found in (decode(row.payload) for row in rows)]


@pytest.fixture
def two(tmp_path):
    """The first release committed, the second on probation."""
    made = Trial(tmp_path / "state")
    made.install(1)
    made.watch(after=61)
    assert made.state.floors.releases == {"m": 1}
    made.install(2)
    return made


def test_floor_raised_only_when_probation_is_over(two):
    assert (active_slot(two.state).counter, two.state.floors.releases) == (2, {"m": 1})
    two.answer(99)
    assert not two.watch()
    assert two.state.floors.releases == {"m": 1}
    two.answer(1)
    assert two.watch()
    assert (two.state.floors.releases, two.state.probation) == ({"m": 2}, None)
    assert two.events()[-1] == ("committed", "")
    assert two.state.outcomes == ()


def test_release_that_fails_on_live_traffic_rolled_back_and_remembered(two):
    two.answer(10)
    two.answer(3, is_failed=True)
    assert two.watch()
    state = two.state
    assert (active_slot(state).counter, other_slot(state).status, state.floors.releases) == (1, "bad", {"m": 1})
    assert [(refusal.counter, refusal.code) for refusal in state.refusals] == [(2, "probation.failures")]
    assert ("rolled_back", "probation.failures") in two.events()
    assert two.bench.plan() is None
    two.bench.shelf.publish(3)
    assert two.bench.plan().release.info.counter == 3


def test_values_that_are_not_finite_end_a_probation(two):
    two.board.page(0).note_bad_output()
    assert two.watch()
    assert two.state.refusals[0].code == "probation.bad_outputs"


def test_counts_survive_the_agents_restarts(two):
    two.answer(60)
    two.unit.pause(time.monotonic())
    two.open()
    two.serve()
    two.answer(39)
    assert not two.watch()
    two.answer(1)
    assert two.watch()
    assert two.state.floors.releases == {"m": 2}


@pytest.mark.fault("F14")
def test_second_crash_on_probation_rolls_back(two):
    two.answer(49)
    two.board.page(0).enter()
    two.unit.note_crash("SIGSEGV", time.monotonic())
    assert (active_slot(two.state).counter, two.state.probation.crashes, two.state.probation.inferences) == (2, 1, 49)
    two.serve()
    two.unit.note_crash("SIGSEGV", time.monotonic())
    assert active_slot(two.state).counter == 1
    assert two.state.refusals[0].code == "probation.crashes"
    assert two.bench.plan() is None  # not fetched again


@pytest.mark.fault("F2")
def test_device_that_boots_for_ever_on_probation_ends_on_the_model_before(two):
    for _ in range(3):
        two.open()
        assert active_slot(two.state).counter == 2
    two.open()
    assert (active_slot(two.state).counter, two.state.refusals[0].code) == (1, "probation.boot_loop")


def test_clean_stops_are_no_boot_loop(two):
    for _ in range(6):
        two.open()
        two.unit.updater.rest()
    assert active_slot(two.state).counter == 2


def test_nothing_is_installed_over_the_way_back(two):
    two.bench.shelf.publish(3)
    assert two.bench.plan() is None
    two.answer(100)
    two.watch()
    assert two.bench.plan().release.info.counter == 3


@pytest.mark.fault("F23")
def test_report_that_fails_undoes_no_commit_and_is_made_up_for(two, monkeypatch):
    monkeypatch.setattr(Journal, "event", lambda *_args, **_named: (_ for _ in ()).throw(OSError("no network, no disk")))
    two.answer(100)
    assert two.watch()
    assert (two.state.floors.releases, [outcome.kind for outcome in two.state.outcomes]) == ({"m": 2}, ["committed"])
    two.open()
    assert [outcome.kind for outcome in two.state.outcomes] == ["committed"]
    monkeypatch.undo()
    two.open()
    assert two.state.outcomes == ()
    assert two.events()[-1] == ("committed", "")
    assert two.state.floors.releases == {"m": 2}


@pytest.mark.fault("F16")
def test_first_release_that_fails_leaves_no_model_and_says_so(tmp_path):
    one = Trial(tmp_path / "state")
    one.install(1)
    one.answer(3, is_failed=True)
    assert one.watch()
    assert active_slot(one.state) is None
    assert asyncio.run(one.unit.wanted()) is None
    assert ("rolled_back", "probation.failures") in one.events()
    assert one.reports


@pytest.mark.fault("F16")
def test_both_slots_damaged_leave_no_model_and_the_release_is_fetched_again(two):
    two.answer(100)
    two.watch()
    for slot in two.state.slots:
        two.bench.slots.blob(slot.name, slot.model_digest).write_bytes(b"rot")
    assert asyncio.run(two.unit.wanted()) is None
    assert [code for kind, code in two.events() if kind == "rolled_back"] == ["slot.damaged", "slot.damaged"]
    assert two.state.refusals == ()
    assert two.bench.plan().release.info.counter == 2


@pytest.mark.fault("F24")
def test_scrub_finds_a_flipped_bit_in_either_slot(two):
    two.answer(100)
    two.watch()
    assert not asyncio.run(two.unit.scrub())
    active, good = active_slot(two.state), other_slot(two.state)
    path = two.bench.slots.blob(good.name, good.model_digest)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert not asyncio.run(two.unit.scrub())
    assert (active_slot(two.state), other_slot(two.state).status) == (active, "empty")
    assert ("install_failed", "slot.damaged") in two.events()


@pytest.mark.fault("F24")
def test_flipped_bit_in_the_active_slot_leaves_the_other_whole(two):
    two.answer(100)
    two.watch()
    active = active_slot(two.state)
    for digest in two.bench.slots.blob_dir(active.name).iterdir():  # the golden samples are the same in both releases
        digest.write_bytes(b"rot")
    assert asyncio.run(two.unit.scrub())
    assert (active_slot(two.state).counter, other_slot(two.state).status) == (1, "empty")
    assert asyncio.run(two.unit.wanted()).manifest.version == "1.0"


def test_damaged_file_and_lost_state_find_the_release_that_proved_itself(two):
    """A model on probation is not what a state is rebuilt from, while a committed one is there."""
    (two.bench.folder / "state.json").unlink()
    two.open()
    assert (active_slot(two.state).counter, two.state.floors.releases) == (1, {"m": 1})
    assert other_slot(two.state).status == "verified"


def test_lost_state_after_the_commit_finds_the_new_release(two):
    two.answer(100)
    two.watch()
    (two.bench.folder / "state.json").unlink()
    two.open()
    assert (active_slot(two.state).counter, two.state.floors.releases) == (2, {"m": 2})


def test_model_that_does_not_start_any_more_on_probation_is_given_up(two):
    failed = SelfTestFailed(DeviceError("selftest.crashed", "dead"), is_final=True, model="m")
    two.unit.note_failure(failed, time.monotonic())
    assert active_slot(two.state).counter == 1


@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("phase", "limit"),
    [("fetch", MAX_INTERRUPTIONS), ("stage", MAX_INTERRUPTIONS), ("selftest", MAX_ATTEMPTS), ("switch", MAX_ATTEMPTS)],
)
def test_device_that_dies_in_the_same_step_for_ever_gives_the_release_up(two, phase, limit):
    two.answer(100)
    two.watch()
    two.bench.shelf.publish(3)
    for _ in range(limit):
        plan = two.bench.plan()
        two.bench.installer.enter("fetch", plan)
        two.bench.installer.enter(phase, plan)
        two.open()
    assert two.bench.plan() is None
    assert [refusal.code for refusal in two.state.refusals] == ["install.interrupted"]
    assert active_slot(two.state).counter == 2
    two.bench.shelf.publish(4)
    assert two.bench.plan().release.info.counter == 4  # attempts count for a release, not for the device


def test_download_that_goes_on_after_each_power_cut_is_no_loop(two):
    two.answer(100)
    two.watch()
    two.bench.shelf.publish(3)
    parts = two.bench.folder / "parts"
    for number in range(3 * MAX_INTERRUPTIONS):
        two.bench.installer.enter("fetch", two.bench.plan())
        (parts / "x.part").write_bytes(b"x" * (number + 1))
        two.open()
    assert two.bench.plan().release.info.counter == 3


# --- what becomes of the state file, and of the disk under it


@pytest.mark.fault("F9")
@pytest.mark.parametrize("damage", [b"", b"\0" * 400, b"{", None, b'{"device":"d","schema_version":99}'])
def test_state_lost_serves_on_keeps_the_floor_and_says_so(two, damage):
    two.answer(100)
    two.watch()
    path = two.bench.folder / "state.json"
    path.unlink() if damage is None else path.write_bytes(damage)
    two.open()
    assert (active_slot(two.state).counter, two.state.floors.releases) == (2, {"m": 2})
    assert asyncio.run(two.unit.wanted()).manifest.version == "2.0"
    assert ("install_failed", "state.rebuilt") in two.events()
    old = two.bench.shelf.releases[0]
    two.bench.shelf.releases[:] = [old]
    assert two.bench.plan() is None  # fail closed


@pytest.mark.fault("F9")
def test_everything_lost_leaves_the_provisioned_minimum(tmp_path):
    made = Trial(tmp_path / "state", minimum_release={"m": 5})
    made.bench.shelf.publish(4)
    assert made.bench.plan() is None
    made.bench.shelf.publish(5)
    assert made.bench.plan().release.info.counter == 5
    (made.bench.folder / "state.json").unlink()
    made.open()
    assert made.state.floors.releases == {"m": 5}


@pytest.mark.fault("F10")
@pytest.mark.parametrize("year", [1970, 2036])
def test_clock_that_is_wrong_takes_nothing_out_of_service(two, year):
    two.answer(100)
    two.watch()
    wrong = datetime(year, 1, 1, tzinfo=UTC)
    assert not two.unit.apply_ban(wrong)
    assert asyncio.run(two.unit.wanted()).manifest.version == "2.0"


@pytest.mark.fault("F10")
def test_clock_set_back_does_not_make_an_expired_model_fresh(two):
    two.answer(100)
    two.watch()
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    slots = tuple(msgspec.structs.replace(slot, valid_until=ended, fallback="abstain") for slot in two.state.slots)
    floors = msgspec.structs.replace(two.state.floors, time=datetime(2026, 6, 1, tzinfo=UTC))
    two.bench.store.update(slots=slots, floors=floors)
    assert two.unit.apply_ban(datetime(1970, 1, 1, tzinfo=UTC))
    assert active_slot(two.state) is None


@pytest.mark.fault("F4")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_disk_that_refuses_every_write_on_probation_stops_nothing(two, monkeypatch, number):
    def refuse(*_args, **_named):
        raise OSError(number, "refused")

    two.answer(100)
    with monkeypatch.context() as patched:
        patched.setattr("edgekit.agent.state_store.write_durably", refuse)
        with pytest.raises(OSError, match="refused"):
            two.watch()
        assert asyncio.run(two.unit.wanted()).manifest.version == "2.0"
        assert two.state.probation is not None
    two.serve()  # it can be written again
    two.answer(100)
    assert two.watch()
    assert two.state.floors.releases == {"m": 2}


# --- the agent before this one, and back

OLD_FIELDS = (
    "device",
    "slots",
    "active",
    "floors",
    "refusals",
    "recalls",
    "failed_deltas",
    "phase",
    "intent",
    "attempts",
    "schema_version",
)
OLD_PHASES = {"idle", "fetch", "stage", "verify", "selftest", "switch", "report"}


@pytest.mark.fault("F29")
def test_state_read_by_the_agent_before_and_back(two):
    """Version 0.1.0 knew these fields and phases only; it reads ours, and we read what it leaves of them."""
    path = two.bench.folder / "state.json"
    two.bench.shelf.publish(3)
    for step in ("fetch", "selftest"):
        two.bench.store.update(phase=step, step="precheck")
        found = json.loads(path.read_bytes())
        assert set(OLD_FIELDS) <= set(found)
        assert found["phase"] in OLD_PHASES
        assert {slot["status"] for slot in found["slots"]} <= {"empty", "staging", "verified", "active", "good", "bad"}
    kept = {name: found[name] for name in OLD_FIELDS} | {"phase": "idle", "intent": "", "attempts": 0}
    path.write_text(json.dumps(kept))  # the old agent serves the active slot, and knows of no probation
    two.open()
    assert (active_slot(two.state).counter, two.state.probation) == (2, None)
    assert asyncio.run(two.unit.wanted()).manifest.version == "2.0"
    assert two.bench.plan().release.info.counter == 3


def test_contract_changes_named():
    inputs = (InputSpec(name="x", dtype="float32", shape=("batch", 4), minimum=0.0),)
    outputs = (TensorSpec(name="y", dtype="float32", shape=("n", 3)),)
    before = Contract(inputs=inputs, outputs=outputs, task="classification", labels=("a", "b", "c"))
    wider = (InputSpec(name="x", dtype="float32", shape=("N", 4), minimum=-9.0),)
    assert contract_changes(before, msgspec.structs.replace(before, inputs=wider, thresholds={"a": 0.5})) == ()
    for change, word in [
        ({"inputs": (InputSpec(name="z", dtype="float32", shape=("b", 4)),)}, "input x is gone"),
        ({"inputs": (InputSpec(name="x", dtype="uint8", shape=("b", 4)),)}, "is uint8, was float32"),
        ({"outputs": (TensorSpec(name="y", dtype="float32", shape=("n", 4)),)}, "has shape"),
        ({"labels": ("a", "c", "b")}, "order"),
        ({"labels": ("a", "b")}, "2 labels, 3 before"),
        ({"task": "other"}, "task"),
    ]:
        assert word in "; ".join(contract_changes(before, msgspec.structs.replace(before, **change)))


def test_short_memory_waits_and_another_contract_is_refused(two, monkeypatch):
    two.answer(100)
    two.watch()
    two.bench.shelf.publish(3, requires=[Requires(runtime="onnxruntime", ram_mb=900)])
    monkeypatch.setattr("edgekit.agent.steps.memory_free_bytes", lambda: 100e6)
    with pytest.raises(DeviceError) as caught:
        two.bench.install()
    assert caught.value.code == "precheck.memory"
    assert len(two.bench.shelf.fetched) == 3  # two models and one golden set: nothing of this one
    monkeypatch.undo()
    two.bench.install()


# --- one process after another, killed at the same place for ever


class Killed(BaseException):
    """The power went."""


PLACES = (
    "fetch",
    "precheck",
    "fetched_blob",
    "stage",
    "staging",
    "verify",
    "selftest",
    "tested",
    "switch",
    "switched",
    "report",
)


@pytest.mark.fault("F2")
@pytest.mark.parametrize("place", [*PLACES, "committing"])
def test_device_killed_at_the_same_place_for_ever_comes_to_an_end(tmp_path, monkeypatch, place):
    made = Round(tmp_path / "state")
    made.updater.config = msgspec.structs.replace(made.bench.config, probation=LIMITS)
    made.bench.shelf.publish(1)
    made.poll()
    made.updater.commit()
    made.bench.shelf.publish(2)

    def killed(name):
        if name == place:
            raise Killed

    for module in ("updater", "steps"):
        monkeypatch.setattr(f"edgekit.agent.{module}.checkpoint", killed)
    for _ in range(3 * MAX_INTERRUPTIONS):
        store = StateStore.open(made.bench.folder, device="d")
        made.bench.store = made.updater.store = store
        with contextlib.suppress(Killed):
            unit = Unit(made.updater.config, store, made.bench.slots, made.journal, made, b"")
            unit.updater._refresh = made.refresh
            unit.recover()
            assert asyncio.run(unit.wanted()) is not None  # whatever happened, something whole is there to serve
            asyncio.run(unit.updater.poll())
            unit.updater.commit()
            if store.state.attempt is None and store.state.refusals:
                break
    monkeypatch.undo()
    store = StateStore.open(made.bench.folder, device="d")
    unit = Unit(made.updater.config, store, made.bench.slots, made.journal, made, b"")
    unit.recover()
    is_behind_the_place = place in {"switched", "report"}  # the next start does not come there again
    assert active_slot(store.state).counter == (2 if is_behind_the_place else 1)
    assert [refusal.counter for refusal in store.state.refusals] == ([] if is_behind_the_place else [2])
    assert store.state.floors.releases == {"m": 2 if is_behind_the_place else 1}


# --- whose fault a worker's death is


class Dead:
    """A worker that died: what it served, and what it was at."""

    def __init__(self, *names, at=()):
        self.start = SimpleNamespace(models=[SimpleNamespace(name=name) for name in names])
        self.suspects = at


def culprits(dead, *, trials=(), names=("m", "n")):
    units = [
        SimpleNamespace(
            config=SimpleNamespace(model=name),
            store=SimpleNamespace(state=SimpleNamespace(probation=TRIAL if name in trials else None)),
        )
        for name in names
    ]
    hosting = Hosting(AgentConfig(), units, None, None, lambda: FACTS, lambda _work: None, None)
    return [unit.config.model for unit in hosting._culprits(dead)]


def test_death_blamed_on_the_model_that_was_at_work():
    assert culprits(Dead("m", "n", at=("n",))) == ["n"]
    assert culprits(Dead("m", "n", at=("n",)), trials=("m",)) == ["n"]  # not on the one that is on probation
    assert culprits(Dead("m", "n")) == []
    assert culprits(Dead("m", "n"), trials=("m",)) == ["m"]
    assert culprits(Dead("m"), names=("m",)) == ["m"]
    assert culprits(Dead("n")) == ["n"]
    assert culprits(Dead()) == []


@pytest.mark.fault("F1")
@pytest.mark.parametrize("place", ["committing", "committed", "telling"])
def test_killed_around_the_commit_is_told_as_one_outcome(two, monkeypatch, place):
    def killed(name):
        if name == place:
            raise Killed

    two.answer(100)
    with monkeypatch.context() as patched:
        for module in ("updater", "steps"):
            patched.setattr(f"edgekit.agent.{module}.checkpoint", killed)
        with pytest.raises(Killed):
            two.watch()
    two.open()
    two.serve()
    two.watch()
    told = [decode(row.payload) for row in two.journal.outbox.read(kinds=("ev",), limit=1000)]
    committed = {event.fields["outcome"] for event in told if event.kind == "committed" and event.counter == 2}
    assert len(committed) == 1
    assert (two.state.floors.releases, two.state.outcomes, two.state.probation) == ({"m": 2}, (), None)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("place", ["rolling_back", "rolled_back", "telling"])
def test_killed_around_the_rollback_ends_on_the_model_before(two, monkeypatch, place):
    def killed(name):
        if name == place:
            raise Killed

    two.answer(3, is_failed=True)
    with monkeypatch.context() as patched:
        patched.setattr("edgekit.agent.updater.checkpoint", killed)
        with pytest.raises(Killed):
            two.watch()
    two.open()
    assert active_slot(two.state).counter == 1
    told = [decode(row.payload) for row in two.journal.outbox.read(kinds=("ev",), limit=1000)]
    assert len({event.fields["outcome"] for event in told if event.kind == "rolled_back"}) == 1
    assert [refusal.code for refusal in two.state.refusals] == ["probation.failures"]
