"""Remote commands: verified, allowed, once, written down, answered; with a real broker and a real agent where they meet."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from edgekit.agent.audit import AuditLog
from edgekit.agent.commands import Commander
from edgekit.agent.config import AgentConfig
from edgekit.agent.debug_bundle import make_bundle, public_settings, strike_out
from edgekit.agent.operation import Operation, OperationStore
from edgekit.agent.state_store import StateStore
from edgekit.errors import EdgekitError, UsageError
from edgekit.schema.base import decode_json, decode_msgpack
from edgekit.schema.benchmark import BenchmarkRun
from edgekit.schema.command import Command, CommandPart, PauseOrder
from edgekit.trust.command import verify_command
from edgekit.trust.command_signer import new_command, sign_command
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer, save_signer
from tests.agent.world import EmbeddedBroker, free_port, wait_for

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
SIGNER = generate_signer()


def order(kind="probe", *, device="cam", now=None, life_s=300.0, **arguments) -> Command:
    return new_command(device, kind, now=now or datetime.now(UTC), life_s=life_s, **arguments)


def code_of(data: bytes, *, keys=(SIGNER.public_key,), now=NOW, threshold=1) -> str:
    try:
        verify_command(data, keys, device="cam", now=now, threshold=threshold)
    except EdgekitError as error:
        return error.code
    return ""


# --- what a device accepts


def test_command_as_it_is_accepted():
    data = sign_command(order(now=NOW), [SIGNER])
    verified = verify_command(data, [SIGNER.public_key], device="cam", now=NOW)
    assert (verified.command.kind, verified.keyids) == ("probe", (SIGNER.keyid,))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"x" * 20_000, "command.too_large"),
        (b"{}", "envelope.malformed"),
        (sign_command(order(now=NOW), [generate_signer()]), "trust.signature"),
        (sign_command(order(now=NOW, device="other"), [SIGNER]), "command.other_device"),
        (sign_command(order(now=NOW - timedelta(hours=1)), [SIGNER]), "command.expired"),
        (sign_command(order(now=NOW + timedelta(hours=1)), [SIGNER]), "command.from_future"),
    ],
)
def test_command_that_is_refused(data, code):
    assert code_of(data) == code


def test_command_that_lives_too_long_is_not_even_signed():
    with pytest.raises(UsageError) as caught:
        sign_command(order(now=NOW, life_s=2 * 86400), [SIGNER])
    assert caught.value.code == "command.malformed"


def test_command_with_one_flipped_byte():
    data = sign_command(order(now=NOW), [SIGNER])
    for at in range(0, len(data), 7):
        assert code_of(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) != ""


def test_command_that_needs_two_keys():
    second = generate_signer()
    command = order(now=NOW)
    keys = (SIGNER.public_key, second.public_key)
    assert code_of(sign_command(command, [SIGNER]), keys=keys, threshold=2) == "trust.signature"
    assert code_of(sign_command(command, [SIGNER, second]), keys=keys, threshold=2) == ""


# --- the device's own log of them


def test_audit_log_shows_what_was_changed(tmp_path):
    log = AuditLog(tmp_path)
    for number in range(5):
        log.write("received", command_id=f"{number:032x}", kind="probe")
    AuditLog(tmp_path).write("finished", command_id="f" * 32, kind="probe")
    assert AuditLog(tmp_path).check() == (6, True)
    assert [entry.number for entry in log.read()] == [1, 2, 3, 4, 5, 6]
    lines = log.path.read_bytes().splitlines(keepends=True)
    for changed in (lines[:2] + lines[3:], [*lines[:2], lines[2].replace(b"probe", b"debug"), *lines[3:]], lines[1:]):
        log.path.write_bytes(b"".join(changed))
        assert not AuditLog(tmp_path).check()[1]


def test_audit_log_after_a_torn_line(tmp_path):
    log = AuditLog(tmp_path)
    log.write("received", command_id="a" * 32, kind="probe")
    with log.path.open("ab") as file:
        file.write(b'{"number":2,"at"')
    log = AuditLog(tmp_path)
    log.write("finished", command_id="a" * 32, kind="probe")
    assert [(entry.number, entry.what) for entry in log.read()] == [(1, "received"), (2, "finished")]


def test_audit_log_goes_on_over_its_rotation(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.agent.audit.MAX_BYTES", 600)
    for number in range(12):
        AuditLog(tmp_path).write("received", command_id=f"{number:032x}", kind="probe")
    log = AuditLog(tmp_path)
    assert (tmp_path / "audit.log.1").exists()
    assert log.read()[-1].number == 12
    assert log.check()[1]


# --- the commander, with everything real but the connection


class Journal:
    def __init__(self) -> None:
        self.events = []

    def event(self, kind, detail="", **more):
        self.events.append((kind, more.get("code", ""), detail))


class Wire:
    def __init__(self) -> None:
        self.sent = []

    def answer(self, where, payload, *, correlation=b"", qos=1) -> bool:
        self.sent.append((where, decode_msgpack(payload, CommandPart)))
        return True


class Updater:
    def __init__(self) -> None:
        self.is_paused, self.busy = False, asyncio.Lock()


class Unit:
    """A model's unit, as far as commands touch one."""

    def __init__(self, folder, config) -> None:
        self.store = StateStore.open(folder, device="cam")
        self.updater, self.wake, self.name, self.config = Updater(), asyncio.Event(), "m", config


class Desk:
    """A commander and what it talks to."""

    def __init__(self, folder, *, commands=("probe", "pause", "resume", "rollback")) -> None:
        keys = folder / "keys"
        if not keys.exists():
            keys.mkdir()
            save_public_key(SIGNER.public_key, keys / "operator.pub")
        self.config = AgentConfig(device="cam", site="lab", state_dir=str(folder), command_keys=str(keys), commands=commands)
        self.journal, self.wire = Journal(), Wire()
        self.unit = Unit(folder, self.config)

        async def settle() -> None:
            pass

        self.operation = Operation(self.config, [self.unit], self.journal, OperationStore(folder), settle)
        self.commander = Commander.open(
            self.config, self.operation, self.journal, sender=self.wire, make_status=lambda: b"{}", spawn=lambda _work: None
        )

    def take(self, *commands: Command, signer=SIGNER) -> list[CommandPart]:
        """Hand commands over at once; what was answered."""

        async def run() -> None:
            await asyncio.gather(*(self.commander.take(sign_command(command, [signer])) for command in commands))

        before = len(self.wire.sent)
        asyncio.run(run())
        return [part for _, part in self.wire.sent[before:]]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_command_is_carried_out_once_even_after_a_restart(desk, tmp_path):
    command = order("pause", pause=PauseOrder(seconds=3600))
    accepted, result = desk.take(command)
    assert (accepted.kind, result.kind, result.code) == ("accepted", "result", "")
    assert desk.unit.updater.is_paused
    desk.take(order("resume"))
    assert not desk.unit.updater.is_paused
    assert desk.take(command) == []
    again = Desk(tmp_path)
    assert again.take(command) == []
    assert not again.unit.updater.is_paused
    assert ("command_received", "command.replayed") in [event[:2] for event in again.journal.events]


def test_command_that_comes_twice_at_once_is_carried_out_once(desk):
    command = order("pause", pause=PauseOrder(seconds=60))
    parts = desk.take(command, command, command)
    assert [part.kind for part in parts] == ["accepted", "result"]


def test_clock_that_goes_back_makes_no_old_command_young(desk, tmp_path, monkeypatch):
    desk.take(order("resume", now=datetime.now(UTC)))
    old = order("pause", now=datetime.now(UTC) - timedelta(hours=2), pause=PauseOrder(seconds=60))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=2)

    monkeypatch.setattr("edgekit.agent.commands.datetime", Clock)
    again = Desk(tmp_path)
    assert again.take(old) == []
    assert not again.unit.updater.is_paused
    assert again.journal.events[-1][1] == "command.expired"


def test_command_that_the_device_was_not_told_to_obey(tmp_path):
    desk = Desk(tmp_path, commands=("probe",))
    (result,) = desk.take(order("pause", pause=PauseOrder(seconds=60)))
    assert result.code == "command.not_allowed"
    assert not desk.unit.updater.is_paused
    assert [entry.what for entry in AuditLog(tmp_path).read()] == ["refused"]


def test_stranger_gets_no_answer_and_floods_nobody(desk):
    stranger = generate_signer()
    assert desk.take(*(order("resume") for _ in range(30)), signer=stranger) == []
    assert len(desk.journal.events) == 10
    assert {event[1] for event in desk.journal.events} == {"trust.signature"}
    assert desk.operation.store.state.seen == {}


def test_answer_goes_to_the_device_s_own_topic_only(desk):
    desk.take(order("resume"))
    assert {where for where, _ in desk.wire.sent} == {"ek/1/lab/cam/rsp"}


def test_probe_in_a_child(desk):
    *_, result = desk.take(order("probe"))
    assert result.code == ""
    profile = json.loads(result.data)
    assert profile["name"] == "cam"
    assert profile["cores"] == os.cpu_count()


def test_command_that_fails_says_why(desk):
    _, result = desk.take(order("rollback"))
    assert result.code == "rollback.nothing"
    assert "nothing to go back to" in result.text
    assert [(entry.what, entry.code) for entry in AuditLog(desk.config.state_path).read()] == [
        ("received", ""),
        ("finished", "rollback.nothing"),
    ]


def test_benchmark_without_a_model_is_a_clear_answer(tmp_path):
    desk = Desk(tmp_path, commands=("benchmark",))
    _, result = desk.take(order("benchmark"))
    assert result.code == "benchmark.no_models"
    assert "it holds no model" in result.text


def test_command_that_the_agent_s_end_interrupted_is_told_and_not_begun_again(desk, tmp_path):
    desk.operation.store.update(running="a" * 32, running_kind="benchmark")
    again = Desk(tmp_path)
    again.commander.recover()
    assert again.journal.events[0][:2] == ("command_finished", "command.interrupted")
    assert again.operation.store.state.running == ""
    assert AuditLog(tmp_path).read()[-1].code == "command.interrupted"


def test_large_answer_in_parts(desk, monkeypatch):
    monkeypatch.setattr("edgekit.agent.commands.PART_BYTES", 100)
    _, *parts = desk.take(order("probe"))
    assert len(parts) > 3
    data = b"".join(part.data for part in parts)
    assert hashlib.sha256(data).hexdigest() == parts[0].digest
    assert json.loads(data)["name"] == "cam"


# --- the debug bundle


def test_debug_bundle_holds_no_secret_and_keeps_its_size(tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    secret = tmp_path / "password"
    secret.write_text("hunter2")
    config = AgentConfig(device="cam", state_dir=str(state), broker_username="cam", broker_password_file=str(secret))
    lines = [f"time=x level=info line={number} {os.urandom(40).hex()}" for number in range(3000)]
    lines[-1] += " mqtts://cam:hunter2@broker.example password=hunter2 AGE-SECRET-KEY-1QQPQ"
    (state / "agent.log").write_text("\n".join(lines))
    data = make_bundle(config, b"{}", max_bytes=60_000)
    assert len(data) <= 60_000
    assert b"hunter2" not in gzip.decompress(data)
    assert b"AGE-SECRET" not in gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = archive.getnames()
        log = archive.extractfile("cam/agent.log").read().decode()
    assert {"cam/settings.json", "cam/checks.json", "cam/files.txt"} <= set(names)
    assert "line=2999" in log
    assert "line=0 " not in log
    assert public_settings(config)["broker_password_file"] == "[struck out]"


def test_private_key_in_a_log_is_struck_out_even_when_it_is_cut():
    assert "MIIE" not in strike_out("x -----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY----- y")
    assert "MIIE" not in strike_out("x -----BEGIN EC PRIVATE KEY-----\nMIIE")


# --- the whole way: command line, broker, agent


@pytest.fixture
def field(tmp_path, world, make_agent):
    """A device that serves, obeys everything, and hangs on a broker."""
    key = tmp_path / "operator.pem"
    save_signer(SIGNER, key, passphrase="")
    keys = tmp_path / "command-keys"
    keys.mkdir()
    save_public_key(SIGNER.public_key, keys / "operator.pub")
    broker = EmbeddedBroker(free_port())
    broker.start()
    world.publish("1.0", seed=1)
    agent = make_agent(
        broker=f"mqtt://127.0.0.1:{broker.port}",
        command_keys=str(keys),
        commands=["probe", "debug", "benchmark", "pause", "resume", "rollback"],
    ).start()
    agent.wait_served("1.0")
    yield agent, [f"--broker=mqtt://127.0.0.1:{broker.port}", f"--key={key}", "--timeout=60"]
    agent.stop()
    broker.stop()


def edgekit(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def test_commands_over_the_broker(field, tmp_path):
    agent, wire = field
    profile = json.loads(edgekit("fleet", "command", "lab/cam", "probe", *wire).stdout)
    assert profile["name"] == "cam"
    assert "updates wait until" in edgekit("fleet", "command", "lab/cam", "pause", "--for", "2h", *wire).stdout
    assert agent.status()["paused_until"]
    edgekit("fleet", "command", "lab/cam", "debug", "--out", str(tmp_path / "debug.tar.gz"), *wire)
    with tarfile.open(tmp_path / "debug.tar.gz") as archive:
        status = json.loads(archive.extractfile("cam/status.json").read())
    assert status["pid"] == agent.process.pid
    save = tmp_path / "run.json"
    shown = edgekit("benchmark", "--device", "lab/cam", "--seconds", "0.05", "--runs", "5", "--save", str(save), *wire)
    assert "m-1.0" in shown.stdout
    run = decode_json(save.read_bytes(), BenchmarkRun)
    assert len(run.models) == 1
    assert "nothing to go back to" in edgekit("fleet", "command", "lab/cam", "rollback", *wire, code=3).stderr
    wait_for(lambda: not OperationStore(agent.state_dir).state.running, what="the end of the last command")
    count, is_whole = AuditLog(agent.state_dir).check()
    assert (count, is_whole) == (10, True)


def test_field_is_closed_to_a_stranger(field, tmp_path):
    agent, wire = field
    save_signer(generate_signer(), tmp_path / "stranger.pem", passphrase="")
    arguments = [wire[0], f"--key={tmp_path / 'stranger.pem'}", "--timeout=2"]
    assert "no answer" in edgekit("fleet", "command", "lab/cam", "pause", *arguments, code=3).stderr
    assert agent.status()["paused_until"] is None
    assert agent.logged("trust.signature")


def test_wrong_usage_is_told_before_anything_is_sent(tmp_path):
    assert "no such command" in edgekit("fleet", "command", "cam", "reboot", code=2).stderr
    assert "--out" in edgekit("fleet", "command", "cam", "debug", code=2).stderr
    assert "no key" in edgekit("fleet", "command", "cam", "probe", code=2).stderr
    assert "--for" in edgekit("fleet", "command", "cam", "probe", "--for", "1d", code=2).stderr
    assert "--data" in edgekit("benchmark", "--device", "cam", "--data", "x.npz", code=2).stderr
    assert "nothing to time" in edgekit("benchmark", code=2).stderr


def test_records_are_forgotten_when_they_have_expired(desk):
    desk.operation.store.update(seen={"b" * 32: datetime.now(UTC) - timedelta(seconds=1)})
    desk.take(order("resume"))
    assert list(desk.operation.store.state.seen) != ["b" * 32]
    assert len(desk.operation.store.state.seen) == 1
    assert msgspec.structs.asdict(desk.operation.store.state)["horizon"] is not None
