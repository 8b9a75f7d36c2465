"""``edgekit demo --drift``: the loop, end to end, on loopback: drift, alert, work order, recalibration, canary, promotion.

Real programs only: repository, fleet server with its broker, agents, ``edgekit recalibrate``. What is told was measured.
"""

from __future__ import annotations

import math
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.cli.console import format_seconds, note, out, paint, table
from edgekit.cli.demo_field import Camera, Weather, accuracy, timeline
from edgekit.cli.demo_processes import Programs, free_port, get_json, run_edgekit, wait_until
from edgekit.cli.fleet_http import send_json
from edgekit.cli.recalibrate_job import JOB_FILE
from edgekit.errors import OperationError, UsageError
from edgekit.schema.base import decode_json
from edgekit.schema.recalibration import JobRecord

MODEL, SITE = "fashion", "demo"
STEPS = 9
PER_SECOND = 30.0
SAMPLES_PER_SECOND = 6
WINDOW_S, INTERVAL_S, GRACE_S = 2, 10, 4
CLEAN_S, AFTER_S, RAMP_S = 32.0, 24.0, 20.0
WANTED_SAMPLES = 700
SPARK_S = 4.0
ALARM_SECONDS, ROLLOUT_SECONDS, INSTALL_SECONDS = 120.0, 120.0, 90.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_DAY_S = 86_400


@dataclass
class Loop:
    """The state of the story."""

    folder: Path
    sample: Path
    programs: Programs
    agents: int
    url: str = ""
    step: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    cameras: list[Camera] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    moments: dict[str, float] = field(default_factory=dict)

    def heading(self, text: str) -> None:
        """Begin the next step."""
        self.step += 1
        spent = format_seconds(time.monotonic() - self.started_s)
        out(f"\n{paint(f'{self.step}/{STEPS} {text}', 'bold', 'cyan')}  {paint(f'[{spent}]', 'dim')}")

    def log(self, name: str) -> Path:
        """The log file of a step or program."""
        return self.programs.log_dir / f"{name}.log"

    def mark(self, name: str) -> float:
        """Remember when something happened."""
        self.moments[name] = time.monotonic()
        return self.moments[name]

    def get(self, path: str) -> Any:
        """What the fleet server says; None while it says nothing."""
        return get_json(f"{self.url}/api/v1{path}")

    @property
    def keys(self) -> Path:
        """The folder of keys."""
        return self.folder / "keys"

    @property
    def repository(self) -> Path:
        """The repository's folder."""
        return self.folder / "repository"


def run_drift(folder: Path, sample: Path, *, agents: int, is_once: bool, marker: str) -> None:
    """Tell the story, and stay up until Ctrl-C unless ``is_once``.

    Args:
        folder: empty.
        sample: the sample model's folder.
        agents: how many devices.
        is_once: end when the story is told.
        marker: name of the file that marks the folder as a demonstration's.
    """
    if not (sample / "finetune.py").is_file():
        raise UsageError("demo.no_sample", f"{sample}: has no finetune.py.", hint="Give the checkout's sample model.")
    (folder / marker).write_text(secrets.token_hex(8))
    (folder / "logs").mkdir()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    loop = Loop(folder=folder, sample=sample, programs=Programs(log_dir=folder / "logs"), agents=agents)
    try:
        _tell(loop)
        out(f"  dashboard  {paint(loop.url, 'bold')}  (drift: {loop.url}/drift/{MODEL})")
        out(f"  report     {_job(loop)}/report.html")
        out(f"  files      {folder}")
        out(f"  the whole loop took {format_seconds(time.monotonic() - loop.started_s)}")
        if not is_once:
            note("\nCtrl-C ends the demonstration.")
            while all(program.is_running for program in loop.programs.started):
                time.sleep(1)
    finally:
        for camera in loop.cameras:
            camera.stop()
        loop.programs.stop()


def _tell(loop: Loop) -> None:
    loop.heading("Optimize, sign and publish release 1.0.0")
    _make_first(loop)
    loop.heading(f"Start repository, fleet server with broker, and {loop.agents} agents; roll 1.0.0 out")
    _start(loop)
    loop.heading("Cameras send the field stream; true labels come a few seconds later")
    _stream(loop)
    loop.heading("Lenses get dirty: less light, haze, blur, sensor noise")
    _drift(loop)
    loop.heading("The server sees drift, an alert fires, a work order opens")
    order = _alarm(loop)
    loop.heading("edgekit recalibrate takes the order: samples, fine-tune, compile, evaluate, publish to staging, canary")
    _recalibrate(loop)
    loop.heading("The canary holds, and the rollout goes on")
    _follow(loop)
    loop.heading("Promote it to production")
    _promote(loop)
    loop.heading("What it was worth")
    _summary(loop, order)


# --- first release ----------------------------------------------------------------------------------------------------------


def _say(command: str) -> None:
    out(paint(f"$ edgekit {command}", "dim"))


def _make_first(loop: Loop) -> None:
    folder, data = loop.folder / "first", loop.sample
    _say("optimize model.onnx --target host --data calibration.npz --eval evaluation.npz --effort fast")
    told = run_edgekit(
        "optimize", str(data / "model.onnx"), "--target", "host", "--data", str(data / "calibration.npz"), "--eval",
        str(data / "evaluation.npz"), "--effort", "fast", "--quiet", "--out", str(folder), ok=(0, 1),
    )  # fmt: skip
    out(f"  {next(line for line in told.splitlines() if line.startswith('Budget'))}")
    run_edgekit("bundle", "keygen", "--out", str(loop.keys / "publisher"), log=loop.log("bundle"))
    run_edgekit("bundle", "keygen", "--out", str(loop.keys / "fleet"), log=loop.log("bundle"))
    bundle = loop.folder / f"{MODEL}-1.0.0.edgekit"
    run_edgekit(
        "bundle", "pack", str(folder), "--name", MODEL, "--version", "1.0.0", "--key", str(loop.keys / "publisher.pem"),
        "--data", str(data / "evaluation.npz"), "--out", str(bundle), log=loop.log("bundle"),
    )  # fmt: skip
    repository = str(loop.repository)
    run_edgekit("repo", "init", repository, "--keys", str(loop.keys / "repository"), log=loop.log("publish"))
    run_edgekit("repo", "trust", repository, str(loop.keys / "publisher.pub"), log=loop.log("publish"))
    told = run_edgekit("repo", "publish", repository, str(bundle), log=loop.log("publish"))
    out(f"  {told.strip()}")


def _start(loop: Loop) -> None:
    loop.ports = {"repository": free_port(8600), "broker": free_port(1883), "fleet": free_port(8420)}
    loop.url = f"http://127.0.0.1:{loop.ports['fleet']}"
    served = f"http://127.0.0.1:{loop.ports['repository']}"
    root = str(loop.repository / "metadata" / "1.root.json")
    trusted = loop.folder / "fleet-keys"
    trusted.mkdir()
    (trusted / "fleet.pub").write_bytes((loop.keys / "fleet.pub").read_bytes())
    program = loop.programs.start("repository", "repo", "serve", str(loop.repository), "--port", str(loop.ports["repository"]))
    wait_until(
        lambda: get_json(f"{served}/metadata/timestamp.json") is not None,
        seconds=30, what="the repository server's start", log=program.log,
    )  # fmt: skip
    program = loop.programs.start(
        "fleet", "fleet", "serve", "--port", str(loop.ports["fleet"]), "--broker-port", str(loop.ports["broker"]),
        "--db", str(loop.folder / "fleet.db"), "--repository", served, "--repository-root", root,
        "--fleet-key", str(loop.keys / "fleet.pem"), "--watch-grace", str(GRACE_S),
    )  # fmt: skip
    wait_until(lambda: loop.get("/health") is not None, seconds=30, what="the fleet server's start", log=program.log)
    for index in range(loop.agents):
        _start_agent(loop, f"camera-{index + 1}", served, root, trusted)
    wait_until(
        lambda: len((loop.get("/devices") or {}).get("devices", ())) == loop.agents,
        seconds=INSTALL_SECONDS, what="every device's first report", log=program.log,
    )  # fmt: skip
    budget = {"alarms": 1.0, "days": 30.0, "effect_floor": 0.005, "interval_s": INTERVAL_S, "slices": ["release"]}
    send_json(loop.url, f"/api/v1/drift/{MODEL}/budget", budget, method="PUT")
    _say(f'fleet rollout start {MODEL}@1.0.0 --waves "100%" --soak 0s')
    run_edgekit(
        "fleet", "rollout", "start", f"{MODEL}@1.0.0", "--waves", "100%", "--soak", "0s", "--gate", "critical_alerts<=0",
        "--url", loop.url, log=loop.log("rollout"),
    )  # fmt: skip
    _wait_served(loop, "1.0.0")
    out(f"  {loop.agents} devices serve {MODEL}@1.0.0; fleet {loop.url}")
    out(f"  watch: {INTERVAL_S} s steps, at most one false alarm in 30 days over all streams")


def _start_agent(loop: Loop, name: str, repository: str, root: str, trusted: Path) -> None:
    port = free_port(8080 + len(loop.ports))
    loop.ports[name] = port
    config = loop.folder / f"{name}.toml"
    config.write_text(
        f"""device = "{name}"
site = "{SITE}"
model = "{MODEL}"
state_dir = "{loop.folder / "agents" / name}"
repository = "{repository}"
root = "{root}"
broker = "mqtt://127.0.0.1:{loop.ports["broker"]}"
fleet_keys = "{trusted}"
port = {port}
poll_s = 2
window_s = {WINDOW_S}
heartbeat_s = 5

[probation]
inferences = 60
max_latency_ratio = 0

[samples]  # what the owner agrees to give: fashion photographs of a warehouse, nobody in them
per_day = {SAMPLES_PER_SECOND * _DAY_S}
max_bytes = 2000000000
redact = ["none"]
k_min = 3
"""
    )
    loop.programs.start(name, "agent", "run", "--config", str(config))


def _versions(loop: Loop) -> list[str]:
    names = [name for name in loop.ports if name.startswith("camera-")]
    found = [get_json(f"http://127.0.0.1:{loop.ports[name]}/v2/models/{MODEL}") or {} for name in names]
    return [str((answer.get("versions") or [""])[0]) for answer in found]


def _wait_served(loop: Loop, version: str) -> None:
    wait_until(
        lambda: set(_versions(loop)) == {version},
        seconds=INSTALL_SECONDS, what=f"every device serving {version}", log=loop.log("camera-1"),
    )  # fmt: skip


# --- the field --------------------------------------------------------------------------------------------------------------


def _stream(loop: Loop) -> None:
    import numpy as np

    with np.load(loop.sample / "field.npz", allow_pickle=False) as data:
        images, labels = data["image"], data["labels"]
    for index in range(loop.agents):
        loop.cameras.append(
            Camera(
                port=loop.ports[f"camera-{index + 1}"],
                model=MODEL,
                images=images,
                labels=labels,
                per_second=PER_SECOND,
                pace=1.0 + 0.15 * (index % 3 - 1),
                seed=index,
            )
        )
    loop.mark("clean")
    for camera in loop.cameras:
        camera.start()
    time.sleep(CLEAN_S)
    count, right = accuracy(loop.cameras, loop.moments["clean"], time.monotonic())
    out(f"  {count} images answered, top-1 {right:.3f}; drift: {_drift_words(loop)}")


def _streams(loop: Loop) -> list[dict[str, Any]]:
    page = loop.get(f"/drift/{MODEL}") or {}
    return [each for each in page.get("streams", ()) if each.get("slice") == "all"]


def _drift_words(loop: Loop) -> str:
    alarms = [each["stream"] for each in _streams(loop) if each["is_alarm"]]
    return f"alarms of {', '.join(alarms)}" if alarms else "none"


def _drift(loop: Loop) -> None:
    begins = loop.mark("dirt")
    weather = Weather(begins_s=begins, ramp_s=RAMP_S)
    for camera in loop.cameras:
        camera.weather = weather
    while (now := time.monotonic()) < begins + RAMP_S * 1.2:
        time.sleep(4.0)
        _, right = accuracy(loop.cameras, now, time.monotonic())
        out(f"  dirt {weather.dirt(now, 1.0) / weather.most:>4.0%}   top-1 of the last 4 s {right:.3f}")
    loop.mark("dirty")


def _alarm(loop: Loop) -> int:
    log = loop.log("fleet")

    def wait(condition: Callable[[], Any], what: str) -> float:
        wait_until(lambda: bool(condition()), seconds=ALARM_SECONDS, what=what, log=log)
        return time.monotonic() - loop.moments["dirt"]

    seen = wait(lambda: any(each["is_alarm"] for each in _streams(loop)), "a drift alarm")
    worst = max(_streams(loop), key=lambda each: each.get("effect") or 0.0)
    effect = f"PSI of {worst['stream']} {worst['effect']:.2f}"
    out(f"  drift seen     {seen:5.0f} s after the first speck: {_drift_words(loop)}; {effect}")
    fired = wait(lambda: _alert(loop), "the alert")
    alert = _alert(loop)["alert"]
    out(f"  alert {alert['id']} fired  {fired:5.0f} s: {alert['rule']}, {alert['summary']}")
    opened = wait(lambda: loop.get(f"/work?model={MODEL}&state=open"), "the work order")
    order = loop.get(f"/work?model={MODEL}&state=open")[0]
    out(f"  work order {order['id']}   {opened:5.0f} s: {order['kind']} {order['model']} ({order['reason']})")
    loop.mark("ordered")
    return int(order["id"])


def _alert(loop: Loop) -> Any:
    found = (loop.get("/alerts?state=firing") or {}).get("alerts", ())
    return next((each for each in found if each["alert"]["rule"] == "input-drift"), None)


# --- the remedy -------------------------------------------------------------------------------------------------------------


def _job(loop: Loop) -> Path:
    return loop.folder / "recalibration"


def _recalibrate(loop: Loop) -> None:
    span = time.monotonic() - loop.moments["dirty"]
    rate = SAMPLES_PER_SECOND * loop.agents
    left = max(0.0, WANTED_SAMPLES / rate - span)
    if left:
        out(f"  waiting {left:.0f} s for {WANTED_SAMPLES} opted-in samples of what cameras see now")
        time.sleep(left)
    since = f"{time.monotonic() - loop.moments['dirty']:.0f}"
    _say(
        f"recalibrate {MODEL} --fleet {loop.url} --model task.py:task --train finetune.py:train --repository repository "
        f"--data calibration.npz --eval evaluation.npz --target host --since {since}s --waves canary:1,100% --soak 6s"
    )
    told = run_edgekit(
        "recalibrate", MODEL, "--fleet", loop.url, "--model", f"{loop.sample / 'task.py'}:task",
        "--train", f"{loop.sample / 'finetune.py'}:train", "--repository", str(loop.repository),
        "--data", str(loop.sample / "calibration.npz"), "--eval", str(loop.sample / "evaluation.npz"), "--target", "host",
        "--effort", "fast", "--since", since, "--key", str(loop.keys / "publisher.pem"), "--waves", "canary:1,100%",
        "--soak", "6s", "--gate", "error_share<=2%", "--gate", "latency_p95_ratio<=4", "--out", str(_job(loop)),
        log=loop.log("recalibrate"), ok=(0, 1),
    )  # fmt: skip
    job = decode_json((_job(loop) / JOB_FILE).read_bytes(), JobRecord, name=JOB_FILE)
    for stage in job.stages:
        out(f"  {stage.name:<9} {stage.text}")
    out("\n".join(f"  {line}" for line in told.rstrip().splitlines()))
    loop.mark("published")
    if not loop.get("/rollouts") or not (_job(loop) / f"{MODEL}-1.0.1.edgekit").is_file():
        raise OperationError("demo.not_better", "the recalibrated model was not published; the report says why.")


def _follow(loop: Loop) -> None:
    seen = ""

    def is_over() -> bool:
        nonlocal seen
        view = (loop.get(f"/rollouts?model={MODEL}") or [{}])[0]
        if not view or view["spec"]["version"] != "1.0.1":
            return False
        state = view["progress"]["state"]
        shown = ", ".join(f"{wave['name']} {wave['committed']}/{wave['devices']}" for wave in view["waves"])
        line = f"{state}: {shown}"
        if line != seen:
            seen = line
            out(f"  {line}")
        if state in {"halted", "rolled_back", "rolling_back", "cancelled"}:
            raise OperationError("demo.rollout_halted", f"the rollout is {state}: {view['progress']['reason']}.")
        return bool(state == "done")

    wait_until(is_over, seconds=ROLLOUT_SECONDS, what="the end of the rollout", log=loop.log("fleet"))
    _wait_served(loop, "1.0.1")
    loop.mark("served")


def _promote(loop: Loop) -> None:
    _say(f"repo promote repository {MODEL}@1.0.1 --to production --data evaluation.npz")
    told = run_edgekit(
        "repo", "promote", str(loop.repository), f"{MODEL}@1.0.1", "--to", "production", "--data",
        str(loop.sample / "evaluation.npz"), "--seconds", "0.3", "--gate", "drop<=0.02, latency_ratio<=1.5",
        log=loop.log("promote"), ok=(0, 1),
    )  # fmt: skip
    out("\n".join(f"  {line}" for line in told.rstrip().splitlines()))
    time.sleep(max(0.0, AFTER_S - (time.monotonic() - loop.moments["served"])))
    loop.mark("end")


def _summary(loop: Loop, order: int) -> None:
    moments = loop.moments
    phases = [
        ("before", moments["clean"], moments["dirt"], "1.0.0"),
        ("dirty lenses", moments["dirty"], moments["published"], "1.0.0"),
        ("after the loop", moments["served"], moments["end"], "1.0.1"),
    ]
    rows = []
    for name, begin, end, version in phases:
        count, right = accuracy(loop.cameras, begin, end)
        rows.append([name, version, str(count), f"{right:.3f}"])
    out(table(["phase", "release", "images", "top-1"], rows, right=[2, 3]))
    values = timeline(loop.cameras, moments["clean"], moments["end"], step_s=SPARK_S)
    out(f"  top-1, {SPARK_S:.0f} s a step  {spark(values)}")
    failed = sum(camera.failed for camera in loop.cameras)
    sent = sum(len(camera.answers) for camera in loop.cameras)
    last = next((camera.last_failure for camera in loop.cameras if camera.last_failure), "")
    out(f"  {sent} requests, {failed} failed{f' ({last})' if failed else ''}")
    finished = loop.get(f"/work/{order}") or {}
    out(f"  work order {order}: {finished.get('state', '?')}: {finished.get('result', '')}")
    out(f"  drift of 1.0.1 against its own baseline: {_drift_words(loop)}")


def spark(values: list[float]) -> str:
    """Shares 0..1 as blocks; a dot where nothing is known.

    >>> spark([0.0, 0.5, 1.0, float("nan")])
    '▁▅█·'
    """
    return "".join("·" if math.isnan(value) else _BLOCKS[min(7, round(value * 7.49))] for value in values)
