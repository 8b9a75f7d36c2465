"""Simulated devices with real signed desired states, at the message seam."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from edgekit.fleet.simulator.behaviour import Outgoing, SimulatedDevice
from edgekit.fleet.simulator.options import SimulatorOptions, parse_faults
from edgekit.fleet.simulator.releases import ReleaseBook, invent_release
from edgekit.schema.desired import DesiredModel, DesiredState, UpdatePolicy
from edgekit.schema.message import AnyMessage
from edgekit.telemetry.codec import decode
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.signer import generate_signer

T0 = 1_790_000_000_000
SIGNER = generate_signer()
NEXT = "kws@2.1.0"


def make_book() -> ReleaseBook:
    return ReleaseBook([invent_release("kws@2.0.0", counter=1), invent_release(NEXT, counter=2)])


def make_device(number: int = 0, *, faults: str = "", keys=(SIGNER.public_key,), book=None, **options) -> SimulatedDevice:
    settings = SimulatorOptions(devices=10_000, faults=parse_faults(faults), **options)
    return SimulatedDevice(settings, number, book or make_book(), start_ms=T0, keys=keys, run="test")


def desired(
    device: SimulatedDevice, *, seq: int = 1, version: str = NEXT, signer=SIGNER, jitter_s: float = 0.0, **fields
) -> bytes:
    release = next(each for each in device.book.releases if each.label == version)
    now = datetime.now(UTC)
    state = DesiredState(
        device=fields.pop("name", device.name),
        seq=seq,
        issued_at=now,
        expires_at=now + timedelta(days=1),
        models={release.model: DesiredModel(counter=release.counter, manifest=fields.pop("manifest", release.manifest))},
        policy=UpdatePolicy(jitter_s=jitter_s),
    )
    return sign_desired(state, [signer])


def hear(device: SimulatedDevice, payload: bytes, *, at_s: float = 0.0) -> None:
    device.hear(payload, now_ms=T0 + round(at_s * 1000), clock=datetime.now(UTC))


def run(device: SimulatedDevice, until_s: float, *, from_s: float = 0.0, step_s: float = 1.0) -> None:
    at = from_s
    while at <= until_s:
        device.step(T0 + round(at * 1000))
        at += step_s


def take(device: SimulatedDevice, at_s: float = 0.0) -> list[Outgoing]:
    found = []
    while (message := device.next_message(T0 + round(at_s * 1000))) is not None:
        found.append(message)
    return found


def said(device: SimulatedDevice, at_s: float = 0.0) -> list[AnyMessage]:
    return [decode(message.payload) for message in take(device, at_s)]
