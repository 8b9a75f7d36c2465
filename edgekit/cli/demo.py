"""``edgekit demo``: the whole way once, on loopback, with real programs and real images.

What needs training was trained before and is kept with the sample model; everything else happens in front of the user:
optimize, sign, publish, install over the air, serve, hot-swap, refuse a broken release, watch it all on the dashboard.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import format_seconds, note, out, paint, table
from edgekit.cli.demo_processes import Load, Programs, free_port, get_json, run_edgekit, wait_until
from edgekit.errors import DeviceError, UsageError

MODEL = "fashion"
SITE = "demo"
REQUESTS_PER_SECOND = 200.0
STEPS = 8
SOAK_SECONDS = 4.0
INSTALL_SECONDS = 90.0
MARKER = ".edgekit-demo"

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@dataclass
class Device:
    """One agent of the demonstration."""

    name: str
    port: int
    state_dir: Path

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Demo:
    """The state of the story."""

    folder: Path
    sample: Path
    programs: Programs
    devices: list[Device] = field(default_factory=list)
    fleet_url: str = ""
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    def heading(self, text: str) -> None:
        """Begin the next step."""
        self.step += 1
        spent = format_seconds(time.monotonic() - self.started)
        out(f"\n{paint(f'{self.step}/{STEPS} {text}', 'bold', 'cyan')}  {paint(f'[{spent}]', 'dim')}")

    def log(self, name: str) -> Path:
        """The log file of a step."""
        return self.programs.log_dir / f"{name}.log"


def _find_sample(given: Path | None) -> Path:
    sample = given or Path(__file__).resolve().parents[2] / "sample_models" / "fashion-mnist"
    if not (sample / "model.onnx").is_file():
        raise UsageError(
            "demo.no_sample",
            f"{sample}: the sample model is not here.",
            hint="Run the demonstration from a checkout of edgekit, or give --sample DIR.",
        )
    return sample


def _prepare_folder(given: Path | None) -> Path:
    """An empty folder: a temporary one, or the given one, which must be empty or left by an earlier demonstration."""
    if given is None:
        return Path(tempfile.mkdtemp(prefix="edgekit-demo-"))
    if given.exists() and any(given.iterdir()) and not (given / MARKER).is_file():
        raise UsageError(
            "demo.folder_in_use", f"{given}: the folder holds other files.", hint="Give an empty folder, or a new one."
        )
    if given.exists():
        shutil.rmtree(given)
    given.mkdir(parents=True)
    return given.resolve()


def _optimize(demo: Demo, model: Path | str, target: str) -> Path:
    folder = demo.folder / f"optimized-{target}-{'task' if 'task' in str(model) else 'onnx'}"
    data, evaluation = demo.sample / "calibration.npz", demo.sample / "evaluation.npz"
    arguments = ["optimize", str(model), "--target", target, "--data", str(data), "--eval", str(evaluation)]
    out(
        paint(
            f"$ edgekit optimize {Path(str(model)).name} --target {target} --data calibration.npz --eval evaluation.npz", "dim"
        )
    )
    out(run_edgekit(*arguments, "--out", str(folder), ok=(0, 1)).rstrip())
    return folder


def _pack(demo: Demo, candidate: Path, version: str) -> Path:
    bundle = demo.folder / f"{MODEL}-{version}.edgekit"
    arguments = ["--name", MODEL, "--version", version, "--key", str(demo.folder / "keys" / "publisher.pem")]
    data = str(demo.sample / "evaluation.npz")
    run_edgekit("bundle", "pack", str(candidate), *arguments, "--data", data, "--out", str(bundle), log=demo.log("bundle"))
    run_edgekit("bundle", "verify", str(bundle), "--key", str(demo.folder / "keys" / "publisher.pub"), log=demo.log("bundle"))
    return bundle


def _break(demo: Demo, bundle: Path, version: str) -> Path:
    """A release whose model was damaged after its golden samples were made, signed all the same.

    This is the accident that a signature cannot stop: somebody packs the wrong weights.
    """
    import msgspec
    import numpy as np
    import onnx

    from edgekit.bundle.provenance.attach import attach_evidence
    from edgekit.bundle.reader import read_bundle
    from edgekit.bundle.writer import Draft, write_bundle
    from edgekit.schema.digest import digest_bytes
    from edgekit.trust.signer import load_signer

    source = read_bundle(bundle)
    variant = source.manifest.variants[0]
    model = onnx.load_from_string(source.blob(variant.model))
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest)
    largest.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::-1]), largest.name))
    broken = model.SerializeToString()
    digest = digest_bytes(broken)
    blobs = {ref.digest: source.blob(ref.digest) for ref in source.manifest.blobs if ref.digest != variant.model} | {
        digest: broken
    }
    refs = tuple(
        msgspec.structs.replace(ref, digest=digest, size_bytes=len(broken)) if ref.digest == variant.model else ref
        for ref in source.manifest.blobs
    )
    manifest = msgspec.structs.replace(
        source.manifest, version=version, blobs=refs, variants=(msgspec.structs.replace(variant, model=digest),)
    )
    draft = attach_evidence(Draft(manifest, blobs))
    signer = load_signer(demo.folder / "keys" / "publisher.pem")
    return write_bundle(draft.manifest, draft.blobs, signer=signer, out=demo.folder / f"{MODEL}-{version}.edgekit")


def _start_servers(demo: Demo, count: int) -> None:
    """Start repository, broker with fleet server, and the agents."""
    repository_port, broker_port, fleet_port = free_port(8600), free_port(1883), free_port(8420)
    repository = demo.folder / "repository"
    program = demo.programs.start("repository", "repo", "serve", str(repository), "--port", str(repository_port))
    demo.fleet_url = f"http://127.0.0.1:{fleet_port}"
    fleet = demo.programs.start(
        "fleet",
        "fleet",
        "serve",
        "--port",
        str(fleet_port),
        "--broker-port",
        str(broker_port),
        "--db",
        str(demo.folder / "fleet.db"),
    )
    metadata = f"http://127.0.0.1:{repository_port}/metadata/timestamp.json"
    wait_until(lambda: get_json(metadata) is not None, seconds=30, what="the repository server's start", log=program.log)
    wait_until(
        lambda: get_json(f"{demo.fleet_url}/api/v1/health") is not None,
        seconds=30,
        what="the fleet server's start",
        log=fleet.log,
    )
    for index in range(count):
        device = Device(
            name=f"device-{index + 1}", port=free_port(8080 + index), state_dir=demo.folder / "agents" / f"device-{index + 1}"
        )
        demo.devices.append(device)
        demo.programs.start(
            device.name,
            *("agent", "run", "--device", device.name, "--site", SITE, "--state-dir", str(device.state_dir)),
            *("--repository", f"http://127.0.0.1:{repository_port}", "--root", str(repository / "metadata" / "1.root.json")),
            *("--model", MODEL, "--port", str(device.port), "--broker", f"mqtt://127.0.0.1:{broker_port}"),
            *("--poll-s", "1", "--window-s", "2"),
        )  # fmt: skip
    out(f"  repository 127.0.0.1:{repository_port}, broker 127.0.0.1:{broker_port}, fleet {demo.fleet_url}")
    out(f"  agents {', '.join(f'{device.name} ({device.url})' for device in demo.devices)}")


def _publish(demo: Demo, bundle: Path) -> None:
    run_edgekit("repo", "publish", str(demo.folder / "repository"), str(bundle), log=demo.log("publish"))


def _served_version(device: Device) -> str:
    """The version that a device serves, or an empty string."""
    answer = get_json(f"{device.url}/v2/models/{MODEL}")
    return str((answer or {}).get("versions", [""])[0])


def _wait_served(demo: Demo, version: str) -> None:
    for device in demo.devices:
        what = f"{device.name}: serving {MODEL}@{version}"
        is_served = partial(_is_served, device, version)
        wait_until(is_served, seconds=INSTALL_SECONDS, what=what, log=demo.log(device.name))


def _is_served(device: Device, version: str) -> bool:
    return _served_version(device) == version


def _load(demo: Demo) -> list[Load]:
    import numpy as np

    with np.load(demo.sample / "field.npz", allow_pickle=False) as field_data:
        images, labels = field_data["image"], field_data["labels"]
    rate = REQUESTS_PER_SECOND / len(demo.devices)
    return [Load(device.port, MODEL, images, labels, per_second=rate) for device in demo.devices]


def _summarize_load(loads: list[Load]) -> tuple[int, int, float, float]:
    sent, failed = sum(load.sent for load in loads), sum(load.failed for load in loads)
    latencies = sorted(value for load in loads for value in load.latencies_ms)
    p50 = latencies[len(latencies) // 2] if latencies else 0.0
    correct = sum(load.correct for load in loads) / max(1, sent - failed)
    return sent, failed, p50, correct


def _refusals(demo: Demo, version: str) -> dict[str, str]:
    """Reason by device, from the fleet's events: what each agent itself reported."""
    events = get_json(f"{demo.fleet_url}/api/v1/events?limit=200") or {}
    items: list[dict[str, Any]] = events.get("events", []) if isinstance(events, dict) else events
    return {
        item["device"]: f"{item.get('code', '')}: {item.get('detail', '')}"
        for item in items
        if item.get("kind") == "install_refused" and item.get("version") == version
    }


def _hot_swap(demo: Demo, bundle: Path) -> None:
    loads = _load(demo)
    for load in loads:
        load.start()
    time.sleep(SOAK_SECONDS)
    _publish(demo, bundle)
    _wait_served(demo, "2.0.0")
    time.sleep(SOAK_SECONDS)
    for load in loads:
        load.stop()
    sent, failed, p50, correct = _summarize_load(loads)
    rows = [
        [
            device.name,
            str(load.sent),
            str(load.failed),
            *(f"{digest[7:19]}: {count}" for digest, count in load.by_digest.items()),
        ]
        for device, load in zip(demo.devices, loads, strict=True)
    ]
    width = max(len(row) for row in rows)
    headers = ["device", "requests", "failed", *(["answers by model digest"] + [""] * (width - 4))][:width]
    out(table(headers, [row + [""] * (width - len(row)) for row in rows], right=[1, 2]))
    verdict = paint("no request failed", "green") if failed == 0 else paint(f"{failed} requests failed", "red")
    out(f"  {sent} real images at {REQUESTS_PER_SECOND:.0f}/s while swapping: {verdict}; p50 {p50:.1f} ms, top-1 {correct:.3f}")
    if failed:
        raise DeviceError(
            "demo.requests_failed", f"{failed} of {sent} requests failed during the swap: {loads[0].last_failure}"
        )


def _tell(demo: Demo, count: int) -> None:
    """The story."""
    demo.heading("Optimize the sample model for this machine and for a Raspberry Pi 4")
    first = _optimize(demo, demo.sample / "model.onnx", "host")
    second = _optimize(demo, f"{demo.sample / 'task.py'}:task", "host")
    _optimize(demo, f"{demo.sample / 'task.py'}:task", "raspberry-pi-4")

    demo.heading("Pack and sign the winners")
    run_edgekit("bundle", "keygen", "--out", str(demo.folder / "keys" / "publisher"), log=demo.log("bundle"))
    bundles = [_pack(demo, first, "1.0.0"), _pack(demo, second, "2.0.0")]
    bundles.append(_break(demo, bundles[1], "3.0.0"))
    for bundle in bundles:
        out(f"  {bundle.name}  {bundle.stat().st_size / 1000:.0f} kB")

    demo.heading(f"Create the repository with its keys; start broker, fleet server and {count} agents")
    repository = str(demo.folder / "repository")
    run_edgekit("repo", "init", repository, "--keys", str(demo.folder / "keys" / "repository"), log=demo.log("publish"))
    run_edgekit("repo", "trust", repository, str(demo.folder / "keys" / "publisher.pub"), log=demo.log("publish"))
    _start_servers(demo, count)

    demo.heading("Publish release 1: every agent installs, tests and serves it")
    _publish(demo, bundles[0])
    _wait_served(demo, "1.0.0")
    for device in demo.devices:
        out(f"  {device.name} serves {MODEL}@{_served_version(device)} at {device.url}/v2/models/{MODEL}")

    demo.heading("Send real images, publish release 2 meanwhile: hot-swapped")
    _hot_swap(demo, bundles[1])

    demo.heading("Publish release 3, broken on purpose: its outputs do not match its golden samples")
    _publish(demo, bundles[2])
    names = {device.name for device in demo.devices}
    wait_until(
        lambda: set(_refusals(demo, "3.0.0")) >= names,
        seconds=INSTALL_SECONDS,
        what="the refusal of release 3",
        log=demo.log("device-1"),
    )
    for name, reason in sorted(_refusals(demo, "3.0.0").items()):
        out(f"  {name} {paint('refused', 'yellow')} {MODEL}@3.0.0: {reason}")
    still = {device.name: _served_version(device) for device in demo.devices}
    if set(still.values()) != {"2.0.0"}:
        raise DeviceError("demo.wrong_release", f"after the broken release the agents serve {still}, expected 2.0.0.")
    out(f"  all agents still serve {MODEL}@2.0.0")

    demo.heading("What the fleet server knows")
    out(run_edgekit("fleet", "devices", "--url", demo.fleet_url, log=demo.log("fleet-devices")).rstrip())


@app.command()
def demo(
    once: bool = typer.Option(False, "--once", help="End when the story is told, instead of staying up until Ctrl-C."),
    folder: Path | None = typer.Option(None, "--dir", help="Where everything is written.  [default: a temporary folder]"),
    sample: Path | None = typer.Option(None, "--sample", help="The sample model's folder.  [default: the checkout's]"),
    agents: int = typer.Option(3, "--agents", min=1, max=12, help="How many agents to start."),
    drift: bool = typer.Option(
        False, "--drift", help="Another story: lenses get dirty; drift, alert, work order, recalibration, canary."
    ),
) -> None:
    """See the whole way once: optimize, sign, publish, three agents, hot swap, a refused release, the dashboard.

    Real programs on loopback only; nothing but pip packages is needed.
    """
    sample_dir = _find_sample(sample)
    place = _prepare_folder(folder)
    if drift:
        from edgekit.cli.demo_drift import run_drift

        run_drift(place, sample_dir, agents=agents, is_once=once, marker=MARKER)
        return
    (place / MARKER).write_text(secrets.token_hex(8))
    (place / "logs").mkdir()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    story = Demo(folder=place, sample=sample_dir, programs=Programs(log_dir=place / "logs"))
    try:
        _tell(story, agents)
        story.heading("Done")
        out(f"  dashboard  {paint(story.fleet_url, 'bold')}")
        out(f"  reports    {place}/optimized-*/report.html")
        out(f"  files      {place}")
        out(f"  the whole way took {format_seconds(time.monotonic() - story.started)}")
        if once:
            return
        note("\nCtrl-C ends the demonstration.")
        loads = _load(story)
        for load in loads:
            load.start()
        while all(program.is_running for program in story.programs.started):
            time.sleep(1)
    finally:
        story.programs.stop()
