"""What an operator does at the device, with a real agent: roll back, install a file, pause, read the log, look it over."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edgekit.agent.checkup import check_agent, expiry_of, is_clock_synchronized, judge_expiry, lock_holder
from edgekit.agent.config import AgentConfig, load_config
from edgekit.agent.inbox import Inbox, Request, new_answer
from edgekit.agent.logs import CappedFile, follow, last_lines
from edgekit.agent.operation import OperationStore
from edgekit.errors import DeviceError, UsageError
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer
from tests.agent.world import build_golden, build_manifest, build_model, wait_for


def edgekit(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "agent", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("EDGEKIT_AGENT_")} | {"NO_COLOR": "1"},
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def write_file(folder: Path, version: str, *, seed: int, signer) -> Path:
    """A bundle that no repository knows."""
    from edgekit.bundle.writer import write_bundle
    from edgekit.schema.digest import digest_bytes

    model, weights = build_model(seed)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    manifest = build_manifest(version=version, blobs=blobs)
    out = folder / f"hand-{version}.edgekit"
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=signer, out=out)
    return out


@pytest.fixture
def agent(world, make_agent, tmp_path):
    """An agent that serves 2.0 and has 1.0 in its other slot; what is new counts as proven at once."""
    keys = tmp_path / "publisher-keys"
    keys.mkdir()
    save_public_key(world.signer.public_key, keys / "publisher.pub")
    made = make_agent(publisher_keys=str(keys), probation={"inferences": 0, "seconds": 0.0})
    world.publish("1.0", seed=1)
    made.start().wait_served("1.0")
    world.publish("2.0", seed=2)
    made.wait_served("2.0")
    return made


def test_rollback_by_hand_holds_until_it_is_allowed_again(agent):
    config = ("--config", agent.config)
    assert "1.0 serves" in edgekit("rollback", *config).stdout
    agent.wait_served("1.0")
    assert "nothing to go back to" in edgekit("rollback", *config, code=3).stderr
    agent.stop()
    agent.start().wait_served("1.0")
    time.sleep(0.8)  # several polls
    assert agent.served() == "1.0"
    shown = edgekit("status", *config).stdout
    assert "refused m@2.0" in shown
    assert "local.rolled_back" in shown
    assert "may come again" in edgekit("rollback", "--allow-again", *config).stdout
    agent.wait_served("2.0")
    assert "no release was taken back" in edgekit("rollback", "--allow-again", *config).stdout
    assert "does not run that model" in edgekit("rollback", "other", *config, code=2).stderr


def test_file_that_a_publisher_signed_stays_until_something_newer_is_published(agent, world, tmp_path):
    config = ("--config", agent.config)
    done = edgekit("install", write_file(tmp_path, "2.5", seed=25, signer=world.signer), *config)
    assert "m@2.5#3 serves" in done.stdout
    assert "No repository metadata speaks of it" in done.stdout
    agent.wait_served("2.5")
    time.sleep(0.8)  # several polls
    assert agent.served() == "2.5"
    assert "m@2.6#3 serves" in edgekit("install", write_file(tmp_path, "2.6", seed=26, signer=world.signer), *config).stdout
    agent.wait_served("2.6")
    world.publish("3.0", seed=3)
    agent.wait_served("3.0")
    assert not list((agent.state_dir / "inbox").glob("*.edgekit"))


def test_file_that_is_refused(agent, world, tmp_path):
    config = ("--config", agent.config)
    stranger = write_file(tmp_path, "4.0", seed=4, signer=generate_signer())
    assert "signed by key" in edgekit("install", stranger, *config, code=4).stderr
    old = write_file(tmp_path, "0.9", seed=9, signer=world.signer)
    assert "is older than" in edgekit("install", old, *config, code=4).stderr
    damaged = tmp_path / "damaged.edgekit"
    data = bytearray((world.bundles / "m-2.0.edgekit").read_bytes())
    data[200] ^= 1
    damaged.write_bytes(data)
    assert "damaged.edgekit" in edgekit("install", damaged, *config, code=4).stderr
    assert "release 1" in edgekit("install", world.bundles / "m-1.0.edgekit", *config, code=3).stderr
    assert "serves already" in edgekit("install", world.bundles / "m-2.0.edgekit", *config, code=3).stderr
    assert agent.served() == "2.0"


def test_file_without_a_publisher_s_key(world, make_agent, tmp_path):
    agent = make_agent().start()
    wait_for(lambda: agent.get("/v2/health/live")[0] == 200)
    bundle = write_file(tmp_path, "1.5", seed=5, signer=world.signer)
    assert "given no publisher's key" in edgekit("install", bundle, "--config", agent.config, code=4).stderr


def test_file_that_signed_metadata_lists_needs_no_key(world, make_agent):
    agent = make_agent(channel="elsewhere").start()
    wait_for(lambda: agent.get("/v2/health/live")[0] == 200)
    world.publish("1.0", seed=1)
    done = edgekit("install", world.bundles / "m-1.0.edgekit", "--config", agent.config)
    assert "signed metadata lists it as release 1" in done.stdout
    agent.wait_served("1.0")


def test_pause_holds_updates_over_a_restart_and_ends(agent, world):
    config = ("--config", agent.config)
    assert "updates wait until" in edgekit("pause", "--for", "8h", *config).stdout
    agent.stop()
    agent.start().wait_served("2.0")
    assert "paused updates wait until" in edgekit("status", *config).stdout
    world.publish("3.0", seed=3)
    time.sleep(0.8)  # several polls
    assert agent.served() == "2.0"
    assert edgekit("resume", *config).stdout == "updates go on\n"
    agent.wait_served("3.0")
    assert "not paused" in edgekit("resume", *config).stdout
    edgekit("pause", "--for", "0.1s", *config)
    wait_for(lambda: OperationStore(agent.state_dir).state.paused_until is None, what="the end of the pause")


def collect_what_shows_what_is_wrong(agent, tmp_path):
    edgekit("debug", "--out", tmp_path / "debug.tar.gz", "--config", agent.config)
    assert (tmp_path / "debug.tar.gz").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "debug.tar.gz") as archive:
        names = archive.getnames()
        status = json.loads(archive.extractfile("cam/status.json").read())
    assert status["pid"] == agent.process.pid
    assert {"cam/states/state.json", "cam/agent.log", "cam/checks.json"} <= set(names)
    assert not any("blobs" in name for name in names)


def test_service_of_a_settings_file(tmp_path):
    config = tmp_path / "agent.toml"
    config.write_text('device = "cam"\n')
    unit = edgekit("service", "--print", "--config", config).stdout
    assert f"--config {config}" in unit
    assert "StateDirectory=edgekit" in unit
    edgekit("service", "--config", config, "--user", "daemon", "--unit-dir", tmp_path)
    assert "User=daemon" in (tmp_path / "edgekit-agent.service").read_text()
    assert "cannot be read" in edgekit("service", "--print", "--config", tmp_path / "none.toml", code=2).stderr


def test_request_to_nobody(tmp_path):
    done = edgekit("rollback", "--state-dir", tmp_path, code=3)
    assert "no agent runs" in done.stderr
    assert not (tmp_path / "inbox").exists()


def test_what_can_be_seen_of_an_agent(agent, tmp_path):
    """Without changing it: its log, a debug bundle, its status and that of no other."""
    see_its_log(agent)
    collect_what_shows_what_is_wrong(agent, tmp_path)
    take_another_s_status_for_its_own(agent, tmp_path)


def take_another_s_status_for_its_own(agent, tmp_path):
    """Another agent has taken the port of one that died without a word."""
    dead = tmp_path / "dead"
    dead.mkdir()
    run = json.loads((agent.state_dir / "agent.json").read_text())
    (dead / "agent.json").write_text(json.dumps(run | {"instance": "0123456789abcdef"}))
    (dead / "state.json").write_text('{"device": "dead"}')
    done = edgekit("status", "--state-dir", dead, code=1)
    assert "does not run" in done.stderr
    assert "cam" not in done.stdout


def test_doctor_of_a_healthy_and_of_a_sick_agent(agent):
    config = ("--config", agent.config)
    found = json.loads(edgekit("doctor", *config, "--json").stdout)
    assert found["is_healthy"], found
    areas = {check["area"] for check in found["checks"]}
    assert {"state", "disk", "agent", "memory", "model", "floors", "trust", "clock", "repository", "runtime", "log"} <= areas
    blob = next((agent.state_dir / "slots").glob("*/blobs/*"))
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    agent.state_dir.chmod(0o755)
    done = edgekit("doctor", *config, code=1)
    assert "not the blob" in done.stdout
    assert "mode 0755" in done.stdout
    agent.stop()
    assert "it does not run" in edgekit("doctor", *config, code=1).stdout


def see_its_log(agent):
    config = ("--config", agent.config)
    lines = edgekit("logs", "-n", "400", *config).stdout.splitlines()
    assert any("event=agent_listening" in line for line in lines)
    (worker,) = agent.worker_pids()
    assert Path(f"/proc/{worker}/oom_score_adj").read_text().strip() == "300"
    events = edgekit("logs", "--events", "-n", "2", *config).stdout.splitlines()
    assert len(events) == 2
    assert all("logger=edgekit.agent.journal" in line for line in events)
    assert (agent.state_dir / "agent.log").stat().st_mode & 0o777 == 0o600
    assert "no agent.log" in edgekit("logs", "--state-dir", agent.state_dir / "slots", code=3).stderr


# --- the inbox


def test_inbox_rings_and_answers(tmp_path):
    import asyncio

    inbox = Inbox(tmp_path)
    bell = inbox.open_bell()
    asked = Request(id="abc", kind="pause", seconds=5)

    async def serve() -> None:
        await inbox.wait(bell, 20)
        taken = inbox.take()
        assert taken == asked
        inbox.answer(new_answer(taken, "done"))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    answer = Inbox(tmp_path).ask(asked, timeout_s=20)
    thread.join()
    os.close(bell)
    assert answer.text == "done"
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["bell"]


def test_inbox_takes_the_oldest_and_drops_what_is_none(tmp_path):
    inbox = Inbox(tmp_path)
    folder = tmp_path / "inbox"
    folder.mkdir()
    for number, text in enumerate(['{"id": "a"}', "{", '{"id": "../../etc"}', '{"id": "d", "kind": "resume"}']):
        path = folder / f"{'abcd'[number]}.request.json"
        path.write_text(text)
        os.utime(path, (number, number))
    assert inbox.take() == Request(id="a")
    assert inbox.take() == Request(id="d", kind="resume")
    assert inbox.take() is None


def test_request_that_nobody_answers_is_taken_back(tmp_path):
    bundle = tmp_path / "x.edgekit"
    bundle.write_bytes(b"x")
    with pytest.raises(DeviceError) as caught:
        Inbox(tmp_path).ask(Request(id="a", kind="install_file"), timeout_s=0.2, bundle=bundle)
    assert caught.value.code == "agent.silent"
    assert list((tmp_path / "inbox").iterdir()) == []


def test_leftovers_of_the_inbox_are_swept(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    for name in ("old.edgekit", "new.edgekit"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / "old.edgekit", (1, 1))
    os.close(Inbox(tmp_path).open_bell())
    assert sorted(path.name for path in folder.iterdir()) == ["bell", "new.edgekit"]


# --- the log


def logger_of(path: Path, max_bytes: int) -> logging.Logger:
    logger = logging.getLogger(f"test.{path}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(CappedFile(path / "agent.log", max_bytes))
    return logger


def test_log_keeps_its_size_and_its_last_lines(tmp_path):
    logger = logger_of(tmp_path, 20_000)
    for number in range(2000):
        logger.info("event=x number=%d", number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    lines = last_lines(tmp_path, 600)
    assert lines == [f"event=x number={number}" for number in range(1400, 2000)]
    assert last_lines(tmp_path, 0) == []


def test_line_that_comes_again_and_again_is_counted(tmp_path):
    logger = logger_of(tmp_path, 20_000)
    for _ in range(100):
        logger.info("event=broker_unreachable")
    logger.info("event=other")
    assert last_lines(tmp_path, 10) == ["event=broker_unreachable", "event=other repeats_before=99"]


def test_log_on_a_disk_that_refuses_disturbs_nobody(tmp_path):
    logger = logger_of(tmp_path / "absent", 20_000)
    logger.info("event=x")
    (tmp_path / "absent").mkdir()
    logger.info("event=y")
    assert last_lines(tmp_path / "absent", 10) == ["event=y"]


def test_log_that_is_followed_over_its_rotation(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.agent.logs.FOLLOW_STEP_S", 0.01)
    logger = logger_of(tmp_path, 2_000)
    logger.info("event=before")
    lines = follow(tmp_path)
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(next(lines) for _ in range(60)), daemon=True)
    thread.start()
    time.sleep(0.1)
    for number in range(60):
        logger.info("event=x number=%d", number)
        time.sleep(0.02)
    thread.join(10)
    assert seen == [f"event=x number={number}" for number in range(60)]


# --- single checks


def test_dates_that_come():
    now = datetime.now(UTC)
    levels = [judge_expiry("x", "y", now + timedelta(days=days), hint="").level for days in (-1, 5, 60)]
    assert levels == ["fault", "note", "ok"]
    assert is_clock_synchronized() in {True, False, None}


def test_checks_without_an_agent_or_its_folder(tmp_path):
    config = AgentConfig(device="cam", state_dir=str(tmp_path / "none"), model="m")
    checkup = check_agent(config)
    assert not checkup.is_healthy
    assert lock_holder(tmp_path / "none") == 0
    assert expiry_of(tmp_path / "none.json") is None


def test_checks_say_why_a_broker_or_a_repository_is_not_reached(tmp_path, world):
    world.stop()
    config = AgentConfig(
        device="cam",
        state_dir=str(tmp_path),
        model="m",
        repository=world.url,
        root=str(world.root),
        broker="mqtt://127.0.0.1:1",
        cert_file=str(tmp_path / "none.pem"),
    )
    faults = {check.area: check.message for check in check_agent(config).checks if check.level == "fault"}
    assert "Connection refused" in faults["broker"]
    assert str(world.port) in faults["repository"]
    assert "none.pem" in faults["tls"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('commands = ["probe"]', "command_keys"),
        ('commands = ["reboot"]', "commands"),
        ('command_keys = "/none"', "no such folder"),
        ("log_bytes = 100", "log_bytes"),
        ("[resources]\nworker_nice = 99", "worker_nice"),
        ("[resources]\ncpu_percent = -1", "cpu_percent"),
    ],
)
def test_settings_that_cannot_be(tmp_path, text, words):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path, environ={})
    assert words in f"{caught.value.message} {caught.value.hint}"
