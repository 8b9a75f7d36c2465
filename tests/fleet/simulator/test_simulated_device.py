"""One simulated device: the agent's rules, without a socket."""

from __future__ import annotations

from simulator_world import NEXT, T0, desired, hear, make_device, run, said, take

from edgekit.agent.windows import METRICS as AGENT_METRICS
from edgekit.agent.windows import SKETCHES as AGENT_SKETCHES
from edgekit.fleet.admission import check_message
from edgekit.fleet.simulator.behaviour import METRICS, SKETCHES
from edgekit.schema.message import Birth, Death, Event, Heartbeat, Label, Reported, WindowBatch
from edgekit.telemetry.codec import decode, unpack_values
from edgekit.telemetry.histogram import LatencyHistogram
from edgekit.trust.signer import generate_signer


def kinds(messages, device_kind=Event):
    return [message.kind for message in messages if isinstance(message, device_kind)]


def test_figures_are_the_agents():
    assert METRICS == AGENT_METRICS
    assert SKETCHES == AGENT_SKETCHES


def test_session_begins_with_birth_and_numbers_have_no_gap():
    device = make_device(telemetry_s=10.0, sampling=1.0)
    device.connected(T0)
    messages = said(device)
    assert [type(message) for message in messages[:3]] == [Birth, Reported, Event]
    run(device, 400)
    messages += said(device, 400)
    for message in messages:
        check_message(message)
    seqs = [
        seq
        for message in messages
        if not isinstance(message, Heartbeat)
        for seq in ([window.seq for window in message.windows] if isinstance(message, WindowBatch) else [message.seq])
    ]
    assert sorted(seqs) == list(range(1, device.seq + 1))
    assert {Heartbeat, WindowBatch, Label} <= {type(message) for message in messages}
    assert decode(device.will) == Death(boot=device.boot)


def test_same_seed_gives_the_same_device_and_another_run_another_boot():
    one, two = make_device(3, faults="slow=50%,offline=50%"), make_device(3, faults="slow=50%,offline=50%")
    for device in (one, two):
        run(device, 120)
    assert take(one, 120) == take(two, 120)
    other = make_device(4)
    assert (other.machine, other.boot) != (one.machine, one.boot)
    again = type(one)(one.options, 3, one.book, start_ms=T0, run="another")
    assert again.machine == one.machine
    assert again.boot != one.boot


def test_window_is_consistent_in_itself():
    device = make_device(telemetry_s=30.0, labelled=0.5)
    run(device, 90)
    batch = next(message for message in said(device, 90) if isinstance(message, WindowBatch))
    window = batch.windows[0]
    values = dict(zip((spec.name for spec in METRICS), unpack_values(window.values), strict=True))
    latency, model = LatencyHistogram.decode(window.sketches[0]), window.models[0]
    assert latency.count == values["requests"] == model.requests > 100
    assert values["latency_p50_ms"] < values["latency_p90_ms"] < values["latency_p99_ms"]
    assert abs(latency.quantile(0.5) / (device.machine.latency_ms(window.start_ms) + 0.4) - 1) < 0.1
    assert 0 < model.right <= model.labelled <= model.sketched
    assert model.profile == device.book.population(device.release).crc


def committed(device, until_s=400):
    run(device, until_s, from_s=1)
    return said(device, until_s)


def test_desired_release_is_installed_proved_and_committed():
    device = make_device()
    take(device)
    hear(device, desired(device, seq=41))
    messages = committed(device)
    assert kinds(messages) == [
        "desired_accepted", "release_found", "install_started", "install_finished", "probation_started", "committed",
    ]  # fmt: skip
    reports = [message for message in messages if isinstance(message, Reported)]
    assert [report.probation for report in reports] == [("kws",), ()]
    assert {report.desired_seq for report in reports} == {41}
    slots = {slot.name: (slot.status, slot.version) for slot in reports[-1].slots}
    assert slots == {"a": ("good", "2.0.0"), "b": ("active", "2.1.0")}
    assert device.release.label == NEXT


def test_release_that_fails_its_self_test_is_refused_and_not_tried_again():
    device = make_device(faults="fail=100%")
    hear(device, desired(device, seq=1))
    messages = committed(device)
    assert "install_refused" in kinds(messages)
    report = [message for message in messages if isinstance(message, Reported)][-1]
    assert report.refused == (device.book.releases[1].manifest,)
    assert (device.release.version, report.last_error_code) == ("2.0.0", "selftest.mismatch")
    hear(device, desired(device, seq=2), at_s=400)
    run(device, 800, from_s=400)
    assert "install_started" not in kinds(said(device, 800))


def test_release_is_taken_back_on_probation():
    device = make_device(faults="rollback=100%")
    hear(device, desired(device))
    messages = committed(device)
    assert kinds(messages)[-2:] == ["probation_started", "rolled_back"]
    assert device.release.version == "2.0.0"
    assert device.slots["b"].status == "bad"


def test_silent_device_goes_on_reporting_and_says_nothing_of_the_release():
    device = make_device(faults="silent=100%")
    take(device)
    hear(device, desired(device))
    messages = committed(device)
    assert kinds(messages) == []
    assert any(isinstance(message, WindowBatch) for message in messages)
    assert (device.desired_seq, device.story.ignored) == (0, 1)


def test_dark_device_loses_its_power_while_it_installs():
    device = make_device(faults="dark=100%")
    hear(device, desired(device))
    run(device, 400)
    assert not device.is_wanted_online
    before = device.waiting
    run(device, 1000, from_s=400)
    assert device.waiting == before


def test_desired_states_that_are_no_good_are_refused_with_the_reason():
    device = make_device()
    take(device)
    hear(device, desired(device, signer=generate_signer()))
    hear(device, desired(device, name="another"))
    hear(device, desired(device, seq=5))
    hear(device, desired(device, seq=5, jitter_s=1.0))
    hear(device, desired(device, seq=6, manifest="sha256:" + "0" * 64))
    codes = [message.code for message in said(device) if isinstance(message, Event)]
    assert codes == ["trust.signature", "desired.other_device", "", "desired.replayed", "", "desired.unknown_release"]


def test_device_without_a_key_obeys_nobody():
    device = make_device(keys=())
    take(device)
    hear(device, desired(device))
    assert (said(device), device.desired_seq) == ([], 0)


def test_fleet_asks_the_release_back():
    """Also where the seed says that most releases are met with silence: the one that it ran before is good."""
    device = next(
        found
        for found in (make_device(number, faults="silent=60%") for number in range(200))
        if found.fate(found.book.releases[1].manifest) == "good" and found.draw(f"release/{found.book.first.manifest}") < 0.6
    )
    hear(device, desired(device, seq=1))
    committed(device)
    hear(device, desired(device, seq=2, version="kws@2.0.0"), at_s=401)
    run(device, 420, from_s=401)
    events = [message for message in said(device, 420) if isinstance(message, Event)]
    assert [(event.kind, event.code) for event in events][-1] == ("rolled_back", "desired.taken_back")
    assert device.release.version == "2.0.0"


def test_newer_wish_supersedes_what_is_being_fetched():
    device = make_device(link_bytes_per_s=1000.0)
    hear(device, desired(device, seq=1))
    run(device, 10)
    hear(device, desired(device, seq=2, version="kws@2.0.0"), at_s=11)
    run(device, 40_000, from_s=11, step_s=100)
    assert (device.release.version, device.story.installed) == ("2.0.0", 0)


def test_jitter_spreads_devices_over_its_span():
    starts = []
    for number in range(40):
        device = make_device(number)
        hear(device, desired(device, jitter_s=1000.0))
        at = next(at for at in range(0, 1001, 10) if device.step(T0 + at * 1000) or device._job is not None)
        starts.append(at)
    assert min(starts) < 150
    assert max(starts) > 850


def test_windows_wait_while_it_is_away_and_old_ones_are_merged():
    device = make_device(telemetry_s=10.0)
    take(device)
    device.is_away = True
    run(device, 1200)
    device.is_away = False
    messages = [message for message in said(device, 1200) if isinstance(message, WindowBatch)]
    windows = [window for batch in messages for window in batch.windows]
    assert messages[0].is_late
    assert device.story.merged >= 60
    covered = []
    for window in windows:
        pairs = window.merged or (window.seq, window.seq)
        covered += [seq for at in range(0, len(pairs), 2) for seq in range(pairs[at], pairs[at + 1] + 1)]
        check_message(messages[0])
    assert len(covered) == len(set(covered)) == 120
    assert all(len(batch.windows) <= 30 for batch in messages)


def test_full_spool_gives_up_the_oldest_and_tells_their_numbers():
    device = make_device(faults="full=100%", telemetry_s=10.0)
    take(device)
    device.is_away = True
    run(device, 300)
    messages = said(device, 300)
    told = [message for message in messages if isinstance(message, Event) and message.kind == "messages_dropped"]
    lost = sum(int(event.fields["count"]) for event in told)
    kept = sum(len(batch.windows) for batch in messages if isinstance(batch, WindowBatch))
    assert (lost + kept, kept) == (30, 10)


def test_crash_is_a_new_boot_with_the_old_messages_kept():
    device = make_device(faults="crashloop=100%", telemetry_s=10.0)
    device.is_away = True
    first = device.boot
    run(device, 900)
    device.is_away = False
    messages = [message for message in said(device, 900) if not isinstance(message, Heartbeat)]
    boots = [message.boot for message in messages]
    assert {first, device.boot} <= set(boots)
    assert device.restarts >= 1
    assert "worker_crashed" in kinds(messages)


def test_clock_that_was_wrong_is_told_with_what_to_add():
    device = make_device(faults="clock=100%", telemetry_s=10.0)
    device.connected(T0)
    run(device, 400)
    messages = said(device, 400)
    birth = next(message for message in messages if isinstance(message, Birth))
    step = next(message for message in messages if isinstance(message, Event) and message.kind == "clock_stepped")
    assert (birth.clock, birth.time_ms) == ("unsynced", 60_000)
    assert birth.time_ms + int(step.fields["delta_ms"]) == T0
    assert step.seq == int(step.fields["last_seq"]) + 1


def test_faults_of_releases_can_be_about_one_release():
    device = make_device(faults="fail=100%,regress=.5", faulty=("kws@9.9.9",))
    assert device.fate(device.book.releases[1].manifest) == "good"
    device = make_device(faults="fail=100%", faulty=(NEXT,))
    assert device.fate(device.book.releases[1].manifest) == "fail"
    assert device.fate(device.book.first.manifest) == "good"


def test_release_that_is_slower_shows_in_the_latencies():
    medians = []
    for faults in ("", "regress=1"):
        device = make_device(faults=faults, telemetry_s=30.0)
        hear(device, desired(device))
        run(device, 400, from_s=1)
        batches = [message for message in said(device, 400) if isinstance(message, WindowBatch)]
        medians.append(LatencyHistogram.decode(batches[-1].windows[-1].sketches[1]).quantile(0.5))
    assert 1.8 < medians[1] / medians[0] < 2.2


def test_devices_have_faults_in_the_shares_that_were_asked_for():
    devices = [make_device(number, faults="slow=20%,offline=5%,fail=5%,silent=10%") for number in range(600)]
    manifest = devices[0].book.releases[1].manifest
    fates = [device.fate(manifest) for device in devices]
    assert 15 <= fates.count("fail") <= 48
    assert 38 <= fates.count("silent") <= 85
    assert 90 <= sum(device._has["slow"] for device in devices) <= 150
    other = [device.fate("sha256:" + "1" * 64) for device in devices]
    assert other != fates
