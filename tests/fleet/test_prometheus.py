"""What ships for Prometheus and Grafana, loaded by a real Prometheus that scrapes a real fleet server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import msgspec
import promql_parser
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parent / "rollout"))
from fleet_world import birth, event, free_port, heartbeat, wait_until
from rollout_world import FleetWorld

from edgekit.fleet import assembly
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.prometheus import MAX_SERIES, Family, Metrics
from edgekit.fleet.server import make_app
from edgekit.fleet.writing import Received

DEPLOY = Path(__file__).resolve().parents[2] / "scripts" / "deploy"
needs_prometheus = pytest.mark.skipif(not shutil.which("promtool"), reason="prometheus is not installed")


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "edgekit-fleet.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = (DEPLOY / "prometheus" / "edgekit.rules.yml").read_text()
    return found + re.findall(r"^\s+expr: (.*)$", rules, re.MULTILINE)


@pytest.fixture
def services(tmp_path):
    world = FleetWorld(str(tmp_path / "fleet.db"), ["fine"] * 12, now=time.time_ns() // 1_000_000)
    world.start(waves="canary:2,100%")
    world.round()
    said = msgspec.structs.replace(event(boot=13, seq=2), kind="install_refused", model="kws", version="2.0.0", counter=2)
    now = world.now
    batch = [birth(boot=13), msgspec.structs.replace(said, time_ms=now), heartbeat(boot=13, seq=2)]
    world.store.apply([Received(site="lab", device="odd", message=message, received_ms=now) for message in batch])
    services = assembly.assemble(FleetConfig(database=str(tmp_path / "fleet.db")), world.store)
    yield services
    world.store.close()


def test_names_and_labels_are_bounded_and_escaped():
    family = Family("x", "gauge", "X.", [({"a": 'q"\n\\'}, 1.5)] + [({"n": str(n)}, 1.0) for n in range(MAX_SERIES + 5)])
    lines = family.text().splitlines()
    assert lines[2] == 'x{a="q\\"\\n\\\\"} 1.5'
    assert len(lines) == 2 + MAX_SERIES


def test_no_series_of_a_single_device(services):
    text = Metrics(services).text()
    assert "cam-0001" not in text
    assert 'edgekit_rollout_devices{model="kws",rollout="1",stage="pending",version="2.0.0"} 2' in text
    assert 'edgekit_devices{state="' in text


@needs_prometheus
def test_text_is_what_prometheus_reads(services):
    text = Metrics(services).text()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip()


@needs_prometheus
def test_rules_that_ship_are_right_and_fire():
    folder = DEPLOY / "prometheus"
    for arguments in (
        ["check", "rules", "edgekit.rules.yml"],
        ["test", "rules", "edgekit.rules.test.yml"],
        ["check", "config", "prometheus.yml"],
    ):
        done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_expression_names_metrics_that_exist():
    from edgekit.fleet import prometheus

    source = Path(prometheus.__file__).read_text()
    for expression in expressions():
        promql_parser.parse(expression)
        for name in re.findall(r"edgekit_[a-z0-9_]+", expression):
            stem = re.sub(r"_(runs|failures)_total$", "_", name)
            assert name in source or f'f"{stem}' in source, name


def test_dashboard_is_whole():
    dashboard = json.loads((DEPLOY / "grafana" / "edgekit-fleet.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells
        cells |= mine
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


@needs_prometheus
def test_prometheus_scrapes_and_every_expression_has_data(services, tmp_path):
    services.alerts.sources.append(
        lambda now: [
            Signal(name=name, value=0.5, samples=100, labels={"model": "kws", "version": "2.0.0", "stream": "x"}, time_ms=now)
            for name in (
                "drift.effect", "drift.evidence", "prediction_drift", "accuracy.estimated", "accuracy.realised",
                "latency.p95_ms", "error.share", "rejected.share",
            )
        ]
    )  # fmt: skip

    class Ingest:
        def status(self):
            from edgekit.fleet.views import IngestStatus

            return IngestStatus(is_broker_connected=True, broker="", received=3, stored=2, duplicates=1, malformed=0)

    services.ingest = Ingest()
    services.jobs.run_once("alerts")
    config = uvicorn.Config(make_app(services.store, None, services=services), port=free_port(), log_level="error")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    wait_until(lambda: server.started)
    port = free_port()
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text().replace("30s", "1s").replace("8420", str(config.port))
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(DEPLOY / "prometheus" / "edgekit.rules.yml", tmp_path)
    with (tmp_path / "log").open("w") as log:
        arguments = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        process = subprocess.Popen(["prometheus", *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def query(expression: str) -> list:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except OSError:
            return []

    try:
        wait_until(lambda: len(query("edgekit_devices")) == 3, seconds=40)
        wait_until(lambda: query("rate(edgekit_ingest_messages_total[5m])"), seconds=40)
        without_bounds = [re.sub(r"\s*(==|>)\s*[0-9.]+$", "", expression) for expression in expressions()]
        missing = [expression for expression in without_bounds if not query(expression)]
        assert missing == []
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=5) as answer:
            groups = json.load(answer)["data"]["groups"]
        assert len(groups[0]["rules"]) == 8
        assert not [rule for rule in groups[0]["rules"] if rule["health"] == "err"]
    finally:
        process.terminate()
        process.wait(20)
        server.should_exit = True
