"""Intervals, slices and the engine over them: counts add up, devices that differ are no drift, state goes on exactly."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import ArtifactError, UsageError
from edgekit.monitor.concept import METHODS, BetState, bet, find_changes, make_detector
from edgekit.monitor.detector import scores_of
from edgekit.monitor.intervals import DeviceWindow, Folder, merge_slices, variation_of
from edgekit.monitor.multivariate import MeanEmbedding, chi_squared_tail_real, classify_domains, evidence_of, step_joint
from edgekit.monitor.performance import weigh
from edgekit.monitor.sketch import Sketcher, build_profile, encode_counts
from edgekit.monitor.streams import decode_many, sketch_widths, watched_streams
from edgekit.monitor.watcher import FORGET_MS, Watcher, WatchRule, WatchState
from edgekit.schema.baseline import ReferenceProfile, StreamProfile


def profile_of(rng, columns=3, samples=6000):
    return build_profile({"x": rng.normal(size=(samples, columns))})


def interval(profile, start_ms, inputs, *, sites=None):
    """``inputs``: by device [n, columns]."""
    folder, members = Folder(profile, start_ms=start_ms), {}
    for device, values in inputs.items():
        sketcher = Sketcher(profile)
        sketcher.observe({"x": values}, {})
        folder.add([DeviceWindow(device=device, samples=len(values), sketched=len(values), sketches=sketcher.take())])
        members[device] = (f"site={sites[device]}",) if sites else ()
    return folder.finish(members)


def test_sketches_decode_together_as_one_by_one():
    rng = np.random.default_rng(0)
    rows = [rng.poisson(rng.choice([0, 0.1, 1, 300]), size=35) * (rng.random(35) < rng.random()) for _ in range(500)]
    rows += [np.zeros(35, dtype=int), np.full(35, 1 << 40)]
    parts = [encode_counts(row) for row in rows]
    found, is_read = decode_many(parts, cells=35)
    assert is_read.all()
    assert (found == np.array(rows)).all()
    broken = [*parts[:5], b"\x00", b"\xff", bytes([1]) * 36, b"\x00\x00\x00\x05", b"\x00\x23\x01", bytes([0x80] * 9 + [1])]
    found, is_read = decode_many(broken, cells=35)
    assert is_read.tolist() == [True] * 5 + [False] * 6
    assert (found[:5] == np.array(rows[:5])).all()
    assert decode_many([], cells=3)[0].shape == (0, 3)


def test_rare_classes_of_many_share_a_bin():
    counts = np.zeros((100, 20), dtype=int)
    counts[:, 5] = np.arange(100)
    stream = StreamProfile(name="y.confidence", kind="classes", tensor="y", counts=tuple(counts.ravel().tolist()))
    confidence, classes = watched_streams(ReferenceProfile(samples=4950, streams=(stream,), classes=100))
    assert len(classes.reference.counts) == 40
    assert classes.labels[-1] == "61 others"
    assert sum(classes.reference.counts) == sum(confidence.reference.counts) == 4950
    assert classes.read(counts.ravel()).tolist() == list(classes.reference.counts)


def test_slices_add_up_to_all_and_merge():
    rng = np.random.default_rng(1)
    profile = profile_of(rng)
    sites = {"a": "north", "b": "north", "c": "south"}
    first, second = (interval(profile, at, {name: rng.normal(size=(50, 3)) for name in sites}, sites=sites) for at in (0, 1))
    widths = sketch_widths(profile)
    for at in range(3):
        parts = [first.slices[name].cells(widths)[at] for name in ("site=north", "site=south")]
        assert (sum(parts) == first.slices["all"].cells(widths)[at]).all()
    both = merge_slices([first.slices["all"], second.slices["all"]], widths)
    assert both.samples == 300
    assert (both.cells(widths)[0] == first.slices["all"].cells(widths)[0] + second.slices["all"].cells(widths)[0]).all()


def test_variation_between_devices_is_that_of_their_means():
    rng = np.random.default_rng(2)
    profile = profile_of(rng, columns=1, samples=20_000)
    watched = watched_streams(profile)[0]
    offsets = rng.normal(0, 0.4, 300)
    offsets *= 0.4 / offsets.std()
    cells = interval(profile, 0, {"all": rng.normal(size=(10, 1))})
    assert np.isnan(cells.variation[0]).all(), "one device tells nothing"
    table = []
    for offset in offsets:
        sketcher = Sketcher(profile)
        sketcher.observe({"x": rng.normal(offset, 1.0, size=(60, 1))}, {})
        table.append(decode_many([sketcher.take()[0]], cells=sketch_widths(profile)[0])[0][0])
    found = variation_of(np.array(table, dtype=float), scores_of(watched.reference))
    assert found[1] == pytest.approx(0.16, rel=0.25)
    assert found[0] < found[1], "over all bins it thins out"


def test_devices_that_differ_are_no_drift_and_one_that_all_share_is():
    rng = np.random.default_rng(3)
    offsets = {f"d{number}": offset for number, offset in enumerate(rng.normal(0, 0.5, 20))}
    profile = build_profile({"x": rng.normal(size=(8000, 1)) + rng.normal(0, 0.5, (8000, 1))})
    watcher = Watcher(profile, WatchRule(interval_s=3600))
    state = watcher.start()
    for hour in range(60):
        state = watcher.advance(state, interval(profile, hour, {k: rng.normal(v, 1.0, (15, 1)) for k, v in offsets.items()}))
        assert not any(verdict.is_alarm for verdict in watcher.verdicts(state))
    for hour in range(60, 75):
        state = watcher.advance(
            state, interval(profile, hour, {k: rng.normal(v + 1.2, 1.0, (15, 1)) for k, v in offsets.items()})
        )
    assert any(verdict.is_alarm for verdict in watcher.verdicts(state))


def test_state_that_was_written_down_goes_on_bit_for_bit():
    rng = np.random.default_rng(4)
    profile = profile_of(rng)
    watcher = Watcher(profile, WatchRule())
    days = [
        interval(
            profile,
            at,
            {f"d{d}": rng.normal(0.1 * at, 1, (30, 3)) for d in range(3 + at % 3)},
            sites=dict.fromkeys([f"d{d}" for d in range(6)], f"s{at % 2}"),
        )
        for at in range(12)
    ]
    whole = parts = watcher.start()
    for day in days:
        whole = watcher.advance(whole, day)
        parts = WatchState.decode(Watcher(profile, WatchRule()).advance(WatchState.decode(parts.encode()), day).encode())
    assert whole.encode() == parts.encode()
    assert watcher.verdicts(whole) == watcher.verdicts(parts)
    with pytest.raises(ValueError, match="in order"):
        watcher.advance(whole, days[3])
    with pytest.raises(ArtifactError, match="state of a watch"):
        WatchState.decode(b"\x01")


def test_slice_that_is_long_gone_is_forgotten_and_the_budget_is_shared_anew():
    rng = np.random.default_rng(5)
    profile = profile_of(rng)
    watcher = Watcher(profile, WatchRule())
    state = watcher.advance(watcher.start(), interval(profile, 0, {"a": rng.normal(size=(9, 3))}, sites={"a": "old"}))
    before = watcher.verdicts(state)[0].threshold
    state = watcher.advance(state, interval(profile, FORGET_MS + 1, {"a": rng.normal(size=(9, 3))}, sites={"a": "new"}))
    assert state.slices == ("all", "site=new")
    state = watcher.advance(state, interval(profile, FORGET_MS + 2, {"a": rng.normal(size=(9, 3))}, sites={"a": "third"}))
    assert watcher.verdicts(state)[0].threshold > before, "three slices share what two did"


@pytest.mark.parametrize("method", METHODS)
def test_concept_drift_is_found_by_every_detector_and_calm_labels_are_not(method):
    rng = np.random.default_rng(6)
    calm, drifted = rng.random(6000) < 0.1, rng.random(3000) < 0.35
    detector = make_detector(method, expected=0.1, arl=100_000)
    found = find_changes(detector, np.concatenate([calm, drifted]))
    before = [at for at in found if at < 6000]
    assert before == [] or method == "ddm", "ddm gives a few false alarms"
    assert next(at for at in found if at >= 6000) < 6000 + 700


def test_concept_detector_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="eddm"):
        make_detector("eddm")


def test_bet_keeps_its_promise_and_counts_add_up_as_single_answers_do_roughly():
    rng = np.random.default_rng(7)
    lengths = []
    for _ in range(150):
        state, steps = BetState(), 0
        while state.total <= np.log(50) and steps < 400:
            state, steps = bet(state, wrong=float(rng.random() < 0.2), answers=1, expected=0.2, margin=0.0), steps + 1
        lengths.append(steps)
    assert np.mean(lengths) >= 50, "a false alarm once in 50 answers on average, or less"
    assert bet(BetState(), wrong=0, answers=0, expected=0.1) == BetState()


def test_drift_of_the_correlation_alone_is_seen_by_the_classifier_and_calm_data_by_none():
    false, found = [0, 0], 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        reference, calm = rng.normal(size=(2000, 4)), rng.normal(size=(300, 4))
        embedding = MeanEmbedding.fit(reference, seed=seed)
        turned = calm.copy()
        turned[:, 1] = 0.6 * turned[:, 0] + 0.8 * turned[:, 1]
        false[0] += embedding.test(calm).p_value < 0.01
        false[1] += classify_domains(reference, calm, seed=seed).p_value < 0.01
        found += classify_domains(reference, turned, seed=seed).p_value < 0.01
        assert embedding.test(calm + 0.3).p_value < 1e-4
    assert max(false) <= 2
    assert found >= 23
    assert embedding.test(calm + 0.3, block=20.0).p_value > embedding.test(calm + 0.3).p_value


def test_p_values_looked_at_again_and_again_keep_the_budget():
    rng = np.random.default_rng(8)
    values = np.exp([evidence_of(p) for p in rng.random(200_000)])
    assert np.mean(np.minimum(values, 1e5)) <= 1.05
    log_m = -np.inf
    for p in (1e-6, 1e-7):
        log_m = step_joint(log_m, p)
    assert log_m > np.log(1e8)
    assert chi_squared_tail_real(7.0, 4.0) == pytest.approx(0.1359, abs=1e-3)


def test_labels_weighted_by_how_rarely_they_are_chosen():
    rng = np.random.default_rng(9)
    confidence = rng.integers(0, 20, 40_000)
    right = rng.random(40_000) < 0.4 + confidence / 40
    chosen = rng.random(40_000) < np.where(confidence > 12, 0.2, 0.02)  # sure answers are labelled ten times as often
    tables = [np.bincount(confidence[mask], minlength=20) for mask in (chosen & right, chosen, np.ones(40_000, dtype=bool))]
    plain = tables[0].sum() / tables[1].sum()
    assert plain - right.mean() > 0.1
    assert weigh(right=tables[0], labelled=tables[1], answered=tables[2]) == pytest.approx(right.mean(), abs=0.045)
    few = np.zeros(20)
    few[3] = 5
    assert np.isnan(weigh(right=few, labelled=few, answered=tables[2]))
