#!/usr/bin/env python3
"""The fleet's story at full size: devices, a real broker, a real database, the server, and a bad release.

A signed repository, a broker (Mosquitto or the embedded one), a database (SQLite or PostgreSQL), ``edgekit fleet serve`` and
``edgekit fleet simulate``, each a process of its own. First the devices connect and report for a while; then a release goes out
that fails on 5 % of them and of which 10 % say nothing: it must halt within the stated bound. Then a good one goes out, and in
the middle of it the server is killed and the broker restarted: nothing may be lost or counted twice, no device may be asked
twice, and the rollout must come to its end.

    python scripts/bench/fleet.py --devices 10000 --database postgres --json figures.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fleet")]

import msgspec
from postgres_server import PostgresServer
from sqlalchemy import select

from edgekit.bundle.writer import write_bundle
from edgekit.cli.fleet_http import send_json
from edgekit.errors import EdgekitError
from edgekit.fleet.rollout.tables import rollout_devices
from edgekit.fleet.simulator.population import make_profile
from edgekit.fleet.store import Store
from edgekit.repository.publishing import publish
from edgekit.schema.base import encode_json
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.digest import digest_bytes
from edgekit.schema.tensor import TensorSpec
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer, save_signer
from tests.agent.world import World, build_golden, build_manifest, build_model

MODEL = "kws"
HZ = os.sysconf("SC_CLK_TCK")
START_S = 60.0
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], *, seconds: float, what: str, each: float = 0.2) -> Any:
    """Wait until the condition is truthy; its value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() >= deadline:
            raise RuntimeError(f"{what}: not within {seconds:.0f} s")
        time.sleep(each)
    return found


def family(pid: int) -> list[int]:
    """A process and those that it started."""
    found, waiting = [], [pid]
    while waiting:
        here = waiting.pop()
        found.append(here)
        for task in Path(f"/proc/{here}/task").glob("*/children"):
            try:
                waiting += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and those that it started used so far."""
    total = 0.0
    for each in family(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / HZ
    return total


def rss_mb(pid: int) -> float:
    """Resident memory of a process and those that it started."""
    total = 0
    for each in family(pid):
        try:
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total / 1e6


def publish_release(world: World, version: str, seed: int) -> None:
    """A release whose contract and baseline are those of the simulator's built-in profile."""
    made, weights = build_model(seed)
    profile = make_profile()
    blobs = {(0, "model"): made, (0, "golden"): build_golden(weights), (0, "baseline"): encode_json(profile)}
    contract = Contract(
        inputs=(InputSpec(name="readings", dtype="float32", shape=("batch", 8)),),
        outputs=(TensorSpec(name="scores", dtype="float32", shape=("batch", profile.classes)),),
        task="classification",
        labels=("ok", "worn", "loose", "stuck"),
    )
    manifest = msgspec.structs.replace(build_manifest(version=version, blobs=blobs, name=MODEL), contract=contract)
    out = world.bundles / f"{MODEL}-{version}.edgekit"
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=world.signer, out=out)
    publish(world.folder, out, keys=[world.signer.public_key])


@dataclass
class Story:
    """Everything that runs; used by the test beside this script, too."""

    folder: Path
    devices: int = 1000
    broker: str = "mosquitto"
    database: str = "sqlite"
    telemetry: str = "30s"
    faults: str = "fail=5%,silent=10%"
    probation: str = "10s"
    self_test: str = "5s"
    soak_min: float = 0.1
    waves: str = "10%,50%,100%"
    """Of the good release."""
    deadline_min: float = 1.0
    """After that a device that says nothing counts as silent."""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.broker_port = free_port(), free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.mosquitto: subprocess.Popen[bytes] | None = None
        self.simulator: subprocess.Popen[bytes] | None = None
        self.postgres: PostgresServer | None = None
        self.world = World(self.folder)
        for number, version in enumerate(("1.0.0", "1.1.0", "1.2.0")):
            publish_release(self.world, version, number)
        signer = generate_signer()
        save_signer(signer, self.folder / "fleet.pem")
        save_public_key(signer.public_key, self.folder / "fleet.pub")
        if self.database == "postgres":
            self.postgres = PostgresServer().start()
            self.postgres.run("CREATE DATABASE fleet")
            self.url_of_database = self.postgres.url("fleet")
        else:
            self.url_of_database = str(self.folder / "fleet.db")

    @property
    def url(self) -> str:
        """The server's."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, method: str = "GET") -> Any:
        """The server's answer."""
        return send_json(self.url, f"/api/v1{path}", body, method=method)

    # processes

    def _spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def start_broker(self) -> None:
        """Mosquitto with persistence; the embedded broker comes with the server."""
        if self.broker != "mosquitto":
            return
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.broker_port} 127.0.0.1\nallow_anonymous true\nuser root\npersistence true\n"
            f"persistence_location {self.folder}/\nmax_queued_messages 0\nmax_inflight_messages 1000\n"
        )
        self.mosquitto = self._spawn("mosquitto", MOSQUITTO, "-c", str(config))
        wait_for(self._is_broker_up, seconds=START_S, what="the broker's start")

    def _is_broker_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.broker_port)) == 0

    def start_server(self) -> None:
        """``edgekit fleet serve``."""
        where = ("--broker", f"mqtt://127.0.0.1:{self.broker_port}") if self.broker == "mosquitto" else ()
        self.server = self._spawn(
            "server",
            *(sys.executable, "-m", "edgekit", "fleet", "serve", "--port", str(self.port), *where),
            *("--broker-port", str(self.broker_port), "--db", self.url_of_database),
            *("--repository", self.world.url, "--repository-root", str(self.world.root)),
            *("--fleet-key", str(self.folder / "fleet.pem")),
        )
        wait_for(self._is_server_up, seconds=START_S, what="the server's start")

    def _is_server_up(self) -> bool:
        if self.server is not None and self.server.poll() is not None:
            raise RuntimeError(f"the server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
        try:
            return bool(self.ask("/health")["ingest"]["is_broker_connected"])
        except EdgekitError:
            return False

    def start_simulator(self) -> None:
        """``edgekit fleet simulate``; it runs until it is told to end."""
        self.simulator = self._spawn(
            "simulator",
            *(sys.executable, "-m", "edgekit", "fleet", "simulate", "--devices", str(self.devices)),
            *("--broker", f"mqtt://127.0.0.1:{self.broker_port}", "--sites", "20", "--model", f"{MODEL}@1.0.0"),
            *("--repository", self.world.url, "--repository-root", str(self.world.root)),
            *("--fleet-key", str(self.folder / "fleet.pub"), "--faults", self.faults, "--seed", "7"),
            *("--faulty-release", f"{MODEL}@1.1.0"),
            *("--telemetry-every", self.telemetry, "--heartbeat-every", self.telemetry, "--probation", self.probation),
            *("--self-test", self.self_test),
            *("--ledger", str(self.folder / "ledger"), "--json"),
        )

    def stop_simulator(self) -> dict[str, Any]:
        """End it cleanly; its summary."""
        assert self.simulator is not None
        self.simulator.send_signal(signal.SIGINT)
        self.simulator.wait(120)
        text = (self.folder / "simulator.log").read_text()
        found: dict[str, Any] = json.loads(text[text.index("\n{") :])["summary"]
        return found

    def stop(self) -> None:
        """End everything that was started here."""
        for process in (self.simulator, self.server, self.mosquitto):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if self.postgres is not None:
            self.postgres.stop()
        self.world.stop()

    # the story

    def begin(self) -> None:
        """Start everything, and wait until every device has reported."""
        self.start_broker()
        self.start_server()
        began = time.monotonic()
        self.start_simulator()

        def all_there() -> bool:
            return int(self.ask("/devices?limit=1")["total"]) >= self.devices

        wait_for(all_there, seconds=60 + self.devices / 20, what="every device's first report", each=0.5)
        self.figures["all_known_s"] = round(time.monotonic() - began, 1)

    def steady(self, seconds: float) -> None:
        """Let them report; what it costs."""
        pids = self._pids()
        before, stored, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, self._windows(), time.monotonic()
        lag = 0.0
        while time.monotonic() - began < seconds:
            lag = max(lag, self.ask("/health")["ingest"]["lag_s"])
            time.sleep(1.0)
        elapsed = time.monotonic() - began
        self.figures["windows_per_s"] = round((self._windows() - stored) / elapsed, 1)
        self.figures["worst_lag_s"] = round(lag, 3)
        for name, pid in pids.items():
            self.figures[f"{name}_cpu_percent"] = round(100 * (cpu_seconds(pid) - before[name]) / elapsed, 1)
            self.figures[f"{name}_rss_mb"] = round(rss_mb(pid), 1)

    def _windows(self) -> int:
        return int(self.ask("/health")["ingest"]["windows"])

    def _pids(self) -> dict[str, int]:
        found = {"server": self.server, "broker": self.mosquitto, "simulator": self.simulator}
        pids = {name: process.pid for name, process in found.items() if process is not None}
        return pids | ({"postgres": self.postgres.process.pid} if self.postgres is not None else {})

    def roll_out(self, version: str, **asked: Any) -> int:
        """Begin a rollout; its number."""
        body = {"model": MODEL, "version": version, "gates": [], "soak_min": 0.05, "reason": "bench"} | asked
        wait_for(lambda: self._is_listed(body), seconds=90, what=f"{version} in the catalog", each=1.0)
        return int(self.ask("/rollouts", body, "POST")["id"])

    def _is_listed(self, body: dict[str, Any]) -> bool:
        try:
            self.ask("/rollouts/dry-run", {key: value for key, value in body.items() if key != "reason"}, "POST")
        except EdgekitError as error:
            if "no such release" in error.message:
                return False
            raise
        return True

    def settled(self, number: int, *states: str, seconds: float = 300.0) -> dict[str, Any]:
        """The rollout, once it is in one of these states."""

        def view() -> dict[str, Any] | None:
            found: dict[str, Any] = self.ask(f"/rollouts/{number}")
            return found if found["progress"]["state"] in states else None

        found: dict[str, Any] = wait_for(view, seconds=seconds, what=f"rollout {number} {' or '.join(states)}", each=0.5)
        return found

    def halt_bad_release(self) -> None:
        """A release that fails on 5 % of the devices, with a bound of 2 %: it halts, and is taken back."""
        began = time.monotonic()
        number = self.roll_out(
            "1.1.0", waves="canary:5%,25%,100%", max_failed=0.02, required_success=0.95, deadline_min=self.deadline_min
        )
        view = self.settled(number, "rolled_back", "halted", "rolling_back")
        halted = time.monotonic() - began
        self.settled(number, "rolled_back")
        asked = [row for row in self._rollout_rows(number).values() if row]
        self.figures |= {
            "bad_release_halted_after_s": round(halted, 1),
            "bad_release_taken_back_after_s": round(time.monotonic() - began, 1),
            "bad_release_reason": view["progress"]["reason"],
            "bad_release_asked": len(asked),
            "bad_release_first_wave": view["waves"][0]["devices"],
        }

    def survive(self) -> None:
        """A good release; in the middle of it the server is killed and the broker restarted."""
        number = self.roll_out("1.2.0", waves=self.waves, deadline_min=10.0, soak_min=self.soak_min)
        wait_for(
            lambda: self.ask(f"/rollouts/{number}")["progress"]["wave"] >= 1, seconds=300, what="the second wave", each=0.2
        )
        assert self.server is not None
        self.server.kill()
        self.server.wait()
        before = self._rollout_rows(number)
        if self.mosquitto is not None:
            self.mosquitto.terminate()
            self.mosquitto.wait()
        down = time.monotonic()
        time.sleep(3.0)
        self.start_broker()
        self.start_server()
        self.figures["down_s"] = round(time.monotonic() - down, 1)
        view = self.settled(number, "done", "halted", "rolled_back", "rolling_back", seconds=600)
        after = self._rollout_rows(number)
        self.figures |= {
            "resumed_state": view["progress"]["state"],
            "resumed_reason": view["progress"]["reason"],
            "asked_before_kill": sum(map(bool, before.values())),
            "asked_twice": sum(after[key] != asked for key, asked in before.items() if asked),
            "never_asked": sum(not asked for asked in after.values()),
        }

    def _rollout_rows(self, number: int) -> dict[int, int]:
        """When each device of a rollout was asked; 0: not yet."""
        row = rollout_devices.c
        store = Store(self.url_of_database)
        try:
            with store.read() as connection:
                found = connection.execute(select(row.device_id, row.asked_ms).where(row.rollout_id == number))
                return {device: asked for device, asked in found}  # noqa: C416 - rows are no pairs to dict()
        finally:
            store.close()

    def end(self) -> None:
        """End the simulator, and compare what was sent with what is stored."""
        summary = self.stop_simulator()
        for name in ("connect_s", "lost_connections", "sent", "acknowledged", "unacknowledged", "resent", "windows"):
            self.figures[f"simulator_{name}"] = summary[name]
        self.figures |= {name: summary[name] for name in ("installed", "committed", "refused", "rolled_back", "ignored")}
        self.figures["simulator_behind_s"] = round(summary["behind_s"], 3)
        checked = subprocess.run(
            [
                *(sys.executable, "-m", "edgekit", "fleet", "simulate", "--devices", "0", "--json"),
                *("--ledger", str(self.folder / "ledger"), "--verify", self.url_of_database),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        verdict = json.loads(checked.stdout)["verdict"]
        names = ("sent", "stored", "lost", "doubled", "foreign", "unsure", "unsure_stored", "examples")
        self.figures["ledger"] = {name: verdict[name] for name in names}


def main() -> int:
    """Tell the story; 0 when every bound held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--broker", choices=("mosquitto", "embedded"), default="mosquitto")
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--telemetry", default="30s", help="Length of a window.")
    parser.add_argument("--steady", type=float, default=120.0, help="Seconds of undisturbed reports that are measured.")
    parser.add_argument("--json", default="", metavar="FILE", help="Write the figures there.")
    parser.add_argument("--keep", default="", metavar="DIR", help="Work there, and leave the logs.")
    given = parser.parse_args()
    folder = Path(given.keep or tempfile.mkdtemp(prefix="edgekit-fleet-"))
    folder.mkdir(parents=True, exist_ok=True)
    story = Story(folder=folder, devices=given.devices, broker=given.broker, database=given.database, telemetry=given.telemetry)
    try:
        for number, (name, part) in enumerate(
            (
                ("connect", story.begin),
                ("steady", lambda: story.steady(given.steady)),
                ("a bad release", story.halt_bad_release),
                ("killed and restarted", story.survive),
                ("verify", story.end),
            ),
            1,
        ):
            print(f"{number}. {name}", file=sys.stderr, flush=True)
            part()
    finally:
        story.stop()
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    story.figures |= {"devices": given.devices, "broker": given.broker, "database": given.database}
    for name, value in story.figures.items():
        print(f"{name:28} {value}")
    if given.json:
        Path(given.json).write_text(json.dumps(story.figures, indent=2) + "\n")
    ledger = story.figures["ledger"]
    is_bound_kept = story.figures["bad_release_asked"] <= story.figures["bad_release_first_wave"]
    is_forgetful = given.broker == "embedded"  # it dies with the server, and keeps messages in memory
    is_exact = not ((ledger["lost"] and not is_forgetful) or ledger["doubled"] or ledger["foreign"])
    is_resumed = story.figures["resumed_state"] == "done" and not (story.figures["asked_twice"] or story.figures["never_asked"])
    print(f"halted in its first wave: {is_bound_kept}; exact: {is_exact}; resumed: {is_resumed}")
    return 0 if is_bound_kept and is_exact and is_resumed else 1


if __name__ == "__main__":
    sys.exit(main())
