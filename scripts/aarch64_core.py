#!/usr/bin/env python3
"""The agent's core on the processor that this runs on: state, slots, plan, trust, telemetry, HTTP, and a model in a worker.

Run by scripts/emulate-aarch64; it runs on any machine. No time is measured. The fixtures were made on the machine that builds:
what signs and packs is not on a device. Without binfmt an emulated process cannot start another one, so the worker runs in
threads of this one, over the same socket pair and the same frames.
"""

from __future__ import annotations

import asyncio
import base64
import json
import platform
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec

from edgekit.agent.board import Board
from edgekit.agent.config import AgentConfig
from edgekit.agent.file_source import FileSource, local_release
from edgekit.agent.link import Drain, Go, Model, Ready, Start, pack_frame, read_to_supervisor
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts, make_plan, slot_of
from edgekit.agent.slots import SlotStore
from edgekit.agent.state_store import StateStore
from edgekit.agent.steps import Installer
from edgekit.agent.worker import _serve
from edgekit.bundle.opening import opened_variant
from edgekit.bundle.reader import verify_bundle
from edgekit.errors import EdgekitError
from edgekit.schema.message import Birth, MetricSpec
from edgekit.schema.state import Slot
from edgekit.target.probe import probe_target
from edgekit.telemetry.codec import decode, encode, pack_values, unpack_values
from edgekit.trust.desired import verify_desired
from edgekit.trust.dsse import decode_envelope, encode_envelope
from edgekit.trust.keys import parse_public_key

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "agent" / "fixtures" / "aarch64.json"


def check_state(folder: Path, _fixture: dict[str, str]) -> str:
    """What is written is read again, also by a store that starts anew."""
    store = StateStore.open(folder, device="cam")
    store.update_slot(Slot(name="b", status="good", model="m", version="1.0", counter=3))
    store.update(phase="fetch", intent="m@2.0#4")
    again = StateStore.open(folder, device="cam").state
    assert again == store.state
    return f"slot b holds {again.slots[1].model}@{again.slots[1].version}"


def check_trust(_folder: Path, fixture: dict[str, str]) -> str:
    """A signature that another machine made holds, and one flipped bit does not."""
    key, data = parse_public_key(fixture["key"]), fixture["desired"].encode()
    now = datetime.fromisoformat(fixture["now"])
    state = verify_desired(data, [key], device="cam", last_seq=0, now=now)
    envelope = decode_envelope(data)
    signature = envelope.signatures[0]
    flipped = msgspec.structs.replace(signature, sig=bytes([signature.sig[0] ^ 1]) + signature.sig[1:])
    changed = encode_envelope(msgspec.structs.replace(envelope, signatures=(flipped,)))
    try:
        verify_desired(changed, [key], device="cam", last_seq=0, now=now)
    except EdgekitError as error:
        return f"seq {state.seq} accepted, a changed one refused: {error.code}"
    raise AssertionError("a changed signature was accepted")


def check_install(folder: Path, fixture: dict[str, str]) -> str:
    """A signed bundle becomes a slot: verified, planned, staged, hashed."""
    bundle, release, slot = _installed(folder, fixture)
    assert slot.manifest == bundle.manifest_digest
    return f"{release.info.name}@{release.info.version} in slot {slot.name}, variant {slot.variant}"


def _installed(folder: Path, fixture: dict[str, str]):  # noqa: ANN202 - three things of three modules

    path = folder / "m.edgekit"
    path.write_bytes(base64.b64decode(fixture["bundle"]))
    bundle = verify_bundle(path, [parse_public_key(fixture["key"])])
    release = local_release(bundle, 1)
    profile = probe_target()
    facts = DeviceFacts(
        arch=profile.arch,
        cpu=profile.cpu,
        isa=profile.isa,
        cores=profile.cores,
        ram_mb=profile.ram_mb,
        os="Linux",
        runtimes={"onnxruntime": "99"},
    )
    config = AgentConfig(device="cam", state_dir=str(folder), model="m")
    store, slots = StateStore.open(folder, device="cam"), SlotStore(folder)
    installer = Installer(config, store, slots, facts)
    plan = make_plan(store.state, [release], model="m", channel="")
    assert plan is not None
    contents = installer.fetch(plan, FileSource(bundle))
    installer.stage(plan, contents)
    installer.verify(plan, contents)
    return bundle, release, slot_of(store.state, plan.slot)


def check_telemetry(_folder: Path, fixture: dict[str, str]) -> str:
    """Messages are the same bytes on every machine."""
    message = decode(base64.b64decode(fixture["birth"]))
    assert isinstance(message, Birth)
    assert base64.b64encode(encode(message)).decode() == fixture["birth"]
    values = [1.5, -2.25, 1e30]
    assert unpack_values(pack_values(values))[:2] == values[:2]
    assert MetricSpec(name="x") in message.metrics
    return f"a birth of {len(fixture['birth'])} characters, byte for byte"


def check_outbox(folder: Path, _fixture: dict[str, str]) -> str:
    """What is spooled is there after the next start."""
    outbox = Outbox(folder / "outbox.db", max_bytes=1 << 20)
    outbox.put(boot=1, seq=1, kind="ev", payload=b"x" * 100)
    outbox.close()
    outbox = Outbox(folder / "outbox.db", max_bytes=1 << 20)
    count = outbox.count
    outbox.close()
    assert count == 1
    return "one message waits"


def check_worker(folder: Path, fixture: dict[str, str]) -> str:
    """The int8 model loads, answers its golden samples within their tolerance, and serves requests over HTTP."""
    bundle, _, slot = _installed(folder, fixture)
    manifest = bundle.manifest
    variant = opened_variant(manifest, manifest.variants[0])
    model = Model(manifest=manifest, variant=variant, blob_dir=str(SlotStore(folder).blob_dir(slot.name)))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    async def run() -> tuple[Ready, dict[str, object]]:
        ours, theirs = socket.socketpair()
        board = Board.create(1)
        serving = asyncio.ensure_future(_serve(theirs, [listener], board))
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        start = Start(models=(model,), threads=1, max_request_bytes=1 << 20, request_timeout_s=60, drain_s=5)
        writer.write(pack_frame(start))
        ready = await read_to_supervisor(reader)
        assert isinstance(ready, Ready), ready
        writer.write(pack_frame(Go()))
        answer = await _ask(port, fixture)
        writer.write(pack_frame(Drain()))
        async with asyncio.timeout(60):
            await serving
        return ready, answer

    ready, answer = asyncio.run(run())
    return f"worst golden error {ready.proofs[0].worst_error:g}, {len(answer['outputs'])} output over HTTP"  # type: ignore[arg-type]


async def _ask(port: int, fixture: dict[str, str]) -> dict[str, object]:
    for _ in range(200):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = fixture["request"].encode()
        writer.write(
            b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        async with asyncio.timeout(60):
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        if head.startswith(b"HTTP/1.1 200"):
            return json.loads(answer)
        await asyncio.sleep(0.1)
    raise AssertionError(head)


CHECKS: dict[str, Callable[[Path, dict[str, str]], str]] = {
    "state": check_state,
    "trust": check_trust,
    "install": check_install,
    "telemetry": check_telemetry,
    "outbox": check_outbox,
    "worker": check_worker,
}


def main() -> int:
    """Every check in a folder of its own; 1 when one fails."""
    fixture = msgspec.json.decode(FIXTURE.read_bytes(), type=dict[str, str])
    failed = 0
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"ok    {name}: {check(Path(folder), fixture)}", flush=True)
            except Exception as error:  # noqa: BLE001 - every check is told
                failed += 1
                print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} on {platform.machine()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
