"""Simulated devices at the message seam: real signed desired states in, real reports out, no broker between."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select

from edgekit.errors import EdgekitError
from edgekit.fleet import tables
from edgekit.fleet.desired import DesiredDesk
from edgekit.fleet.rollout.requests import RolloutRequest, make_spec
from edgekit.fleet.rollout.service import RolloutService
from edgekit.fleet.rollout.tables import desired
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from edgekit.schema.message import Birth, Event, Heartbeat, Reported, SlotReport
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.trust.desired import verify_desired
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.signer import generate_signer

T0 = 1_790_000_000_000
MINUTE = 60_000
SIGNER = generate_signer()


def release(version: str, *, model: str = "kws", channel: str = "production") -> Release:
    number = int(version.split(".", maxsplit=1)[0])
    info = ReleaseInfo(
        name=model,
        version=version,
        channel=channel,
        counter=number,
        published_at=datetime(2026, 11, 1, tzinfo=UTC),
        installed_bytes=10,
        runtimes=("onnxruntime",),
    )
    return Release(
        info=info,
        manifest_path=f"models/{model}/{version}/manifest.json",
        manifest_digest="sha256:" + f"{number:02x}" * 32,
        manifest_size_bytes=10,
    )


class Shelf:
    """A catalog of releases."""

    def __init__(self, *releases: Release) -> None:
        self._releases = releases

    def releases(self, *, channel: str = "", model: str = "") -> tuple[Release, ...]:
        return tuple(each for each in self._releases if channel in {"", each.info.channel} and model in {"", each.info.name})


class Device:
    """One simulated device: what it does with a release is its fate."""

    def __init__(self, number: int, fate: str, *, site: str = "lab") -> None:
        self.site, self.name, self.fate = site, f"cam-{number:04}", fate
        self.boot, self.seq, self.last_seq = number + 1, 0, 0
        self.serving, self.previous = ("1.0.0", 1), None
        self.installed: list[str] = []

    def next(self) -> int:
        self.seq += 1
        return self.seq

    def birth(self, now_ms: int) -> Birth:
        return Birth(boot=self.boot, seq=self.next(), time_ms=now_ms, metrics=(), arch="aarch64")

    def report(self, now_ms: int) -> Reported:
        version, counter = self.serving
        slot = SlotReport(
            name="a",
            status="active",
            model="kws",
            version=version,
            counter=counter,
            model_digest="sha256:" + f"{counter:02x}" * 32,
            manifest_digest="sha256:" + f"{counter:02x}" * 32,
        )
        return Reported(boot=self.boot, seq=self.next(), time_ms=now_ms, slots=(slot,), active="a", desired_seq=self.last_seq)

    def obey(self, envelope: bytes, now_ms: int) -> list:
        """What it reports after a desired state arrived."""
        if self.fate == "silent":
            return []
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        try:
            state = verify_desired(envelope, [SIGNER.public_key], device=self.name, last_seq=self.last_seq, now=now)
        except EdgekitError:
            return []
        self.last_seq = state.seq
        wanted = state.models.get("kws")
        if wanted is None or wanted.counter == self.serving[1]:
            return [self.report(now_ms)]
        if wanted.counter < self.serving[1]:
            self.serving = (f"{wanted.counter}.0.0", wanted.counter)
            return [self.event("rolled_back", now_ms, counter=wanted.counter + 1), self.report(now_ms)]
        self.installed.append(f"{wanted.counter}.0.0")
        if self.fate == "fail":
            return [self.event("install_refused", now_ms, counter=wanted.counter), self.report(now_ms)]
        self.serving = (f"{wanted.counter}.0.0", wanted.counter)
        return [self.event("install_finished", now_ms, counter=wanted.counter), self.report(now_ms)]

    def event(self, kind, now_ms: int, *, counter: int) -> Event:
        return Event(
            boot=self.boot,
            seq=self.next(),
            time_ms=now_ms,
            kind=kind,
            detail="as its fate is",
            code="selftest.mismatch" if kind != "install_finished" else "",
            model="kws",
            version=f"{counter}.0.0",
            counter=counter,
        )


class FleetWorld:
    """A store with simulated devices, a desk with a key, and the rollouts over them."""

    def __init__(self, url: str, fates: list[str], *, releases=("1.0.0", "2.0.0", "3.0.0"), now=T0) -> None:
        self.now = now
        self.url, self.shelf = url, Shelf(*(release(version) for version in releases))
        self.devices = [Device(number, fate) for number, fate in enumerate(fates)]
        self.open()
        self.say(lambda device: [device.birth(self.now), device.report(self.now)])

    def open(self) -> None:
        self.store = Store(self.url)
        self.desk = DesiredDesk(self.store, sign=lambda state: sign_desired(state, [SIGNER]), publisher=None)
        self.service = RolloutService(self.store, self.desk, catalog=self.shelf)

    def say(self, speak) -> None:
        batch = [
            Received(site=device.site, device=device.name, message=message, received_ms=self.now)
            for device in self.devices
            for message in speak(device)
        ]
        for at in range(0, len(batch), 500):
            self.store.apply(batch[at : at + 500])

    def envelopes(self) -> dict[str, bytes]:
        row = tables.devices.c
        with self.store.read() as connection:
            found = connection.execute(select(row.device, desired.c.envelope).join(desired, desired.c.device_id == row.id))
            return {device: bytes(envelope) for device, envelope in found}

    def round(self, *, minutes: float = 1.0) -> None:
        """Time passes, every device looks at its retained desired state and reports, and the rollouts take their turn."""
        self.now += round(minutes * MINUTE)
        retained = self.envelopes()
        self.say(
            lambda device: (
                ([] if device.fate == "silent" else [Heartbeat(boot=device.boot, seq=device.seq, time_ms=self.now)])
                + (device.obey(retained[device.name], self.now) if device.name in retained else [])
            )
        )
        self.service.turn(self.now)

    def start(self, version: str = "2.0.0", **asked) -> int:
        defaults = {"waves": "canary:5,10%,50%,100%", "gates": (), "soak_min": 5.0, "deadline_min": 20.0}
        request = RolloutRequest(model="kws", version=version, **(defaults | asked))
        spec = make_spec(request, self.service.find_release("kws", version))
        return self.service.start(spec, actor="operator", now_ms=self.now)

    def view(self, number: int):
        return self.service.view(number, self.now)

    def run(self, number: int, *, rounds: int = 200, minutes: float = 1.0):
        """Rounds until the rollout is settled."""
        for _ in range(rounds):
            self.round(minutes=minutes)
            view = self.view(number)
            if view.progress.state in {"done", "halted", "rolled_back"}:
                break
        return self.view(number)
