"""Alerts over a real store, delivered to real receivers on loopback."""

from __future__ import annotations

import asyncio
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))
from fleet_world import T0, birth, event, heartbeat, wait_until
from rollout_world import FleetWorld

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.fleet.alerting.delivery import Courier, expand, shown, sign
from edgekit.fleet.alerting.engine import Silence
from edgekit.fleet.alerting.service import MAX_ATTEMPTS, Alerts
from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.alerting.sources import store_signals
from edgekit.fleet.audit import Audit
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.services import Services
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received

MINUTE = 60_000
RULE = """
[[rule]]
name = "errors"
signal = "error.share"
above = 0.05
level = "critical"
group_by = ["model", "version"]
notify = "on-call"
"""
QUIET = """
[[rule]]
name = "requests-fail"
signal = "error.share"
above = 1
is_enabled = false
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Receiver:
    """A webhook's receiver; answers with the status it is told."""

    def __init__(self) -> None:
        self.requests, self.status = [], 200
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((dict(self.headers), body))
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"webhook+http://127.0.0.1:{self.server.server_port}/hook?key=hidden"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    found = Receiver()
    yield found
    found.stop()


@pytest.fixture
def make(tmp_path):
    stores = []

    def build(rules: str, *, environment=None, url: str = "", **more):
        (tmp_path / "rules.toml").write_text(rules + QUIET)
        store = Store(url or str(tmp_path / "fleet.db"))
        stores.append(store)
        services = Services(config=FleetConfig(rules=str(tmp_path / "rules.toml")), store=store, jobs=Jobs(store, owner="one"))
        signals = []
        service = Alerts(
            services,
            sources=[lambda _now: list(signals)],
            courier=Courier(environment=environment or {}, is_private_allowed=True),
            base_url="https://fleet.example",
            **more,
        )
        service.now_signals = signals
        return service

    yield build
    for store in stores:
        store.close()


def contact(*urls: str, secret: str = "") -> str:
    return f'\n[[contact]]\nname = "on-call"\nurls = {json.dumps(urls)}\nsecret = "{secret}"\n'


def errors(value: float, version: str = "2.0.0") -> Signal:
    return Signal(name="error.share", value=value, samples=1000, labels={"model": "kws", "version": version})


def test_webhook_is_signed_and_comes_once(make, receiver):
    service = make(RULE + contact(receiver.url, secret="${HOOK}"), environment={"HOOK": "s3cret"})
    service.now_signals[:] = [errors(0.2)]
    for turn in range(3):
        service.turn(T0 + turn * MINUTE)
        service.deliver(T0 + turn * MINUTE)
    assert len(receiver.requests) == 1
    headers, body = receiver.requests[0]
    message = json.loads(body)
    assert message["title"] == "[critical] errors (model kws, version 2.0.0)"
    assert "https://fleet.example/alerts/1" in message["text"]
    seconds, _, digest = headers["X-Edgekit-Signature"].removeprefix("t=").partition(",v1=")
    assert digest == sign("s3cret", int(seconds), body)
    assert headers["X-Edgekit-Delivery"] == message["id"] == "edgekit-1-1"
    (delivery,) = service.deliveries()
    assert (delivery.status, delivery.kind) == ("sent", "firing")
    assert "hidden" not in delivery.channel


def test_failed_delivery_is_tried_again_and_shown(make, receiver):
    service = make(RULE + contact(receiver.url))
    receiver.status = 503
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    assert service.deliver(T0) == 0
    (delivery,) = service.deliveries()
    assert (delivery.status, delivery.attempts) == ("pending", 1)
    assert "503" in delivery.error
    assert service.deliver(T0 + 1000) == 0
    assert len(receiver.requests) == 1  # not before its time
    receiver.status = 200
    assert service.deliver(T0 + MINUTE) == 1
    assert len({headers["X-Edgekit-Delivery"] for headers, _ in receiver.requests}) == 1


def test_delivery_given_up_is_a_signal(make, receiver):
    service = make(RULE + contact(receiver.url))
    receiver.status = 500
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    for attempt in range(MAX_ATTEMPTS + 3):
        service.deliver(T0 + attempt * 3_600_000)
    assert len(receiver.requests) == MAX_ATTEMPTS
    assert [delivery.status for delivery in service.deliveries()] == ["failed"]
    found = {signal.name: signal.value for signal in store_signals(service._services, T0)}
    assert found["delivery.failed"] == 1
    assert "delivery failed" in [item.what for item in service.view(1, T0).timeline]


def test_secret_that_is_missing_is_named_and_never_shown(make, receiver):
    service = make(RULE + contact(receiver.url.replace("hidden", "${KEY}")))
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    service.deliver(T0)
    (delivery,) = service.deliveries()
    assert "${KEY}: not in this server's environment" in delivery.error
    assert expand("a${X}b", {"X": "1"}) == "a1b"


def test_redirect_is_not_followed(make, receiver):
    service = make(RULE + contact(receiver.url))
    receiver.status = 302
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    assert service.deliver(T0) == 0
    assert "302" in service.deliveries()[0].error


@pytest.mark.parametrize(
    "url",
    ["webhook+http://127.0.0.1:9/x", "webhook+http://[::1]/x", "webhook+http://10.0.0.1/x", "webhook+http://169.254.169.254/"],
)
def test_webhook_into_the_own_network_refused(make, url):
    service = make(RULE + contact(url))
    service.courier = Courier(environment={})
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    service.deliver(T0)
    (delivery,) = service.deliveries()
    assert delivery.status == "failed"
    assert "own networks" in delivery.error


def test_server_killed_between_writing_and_sending_sends_later(make, receiver, tmp_path):
    service = make(RULE + contact(receiver.url))
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    again = make(RULE + contact(receiver.url))  # the next process: only the database is left
    again.now_signals[:] = [errors(0.2)]
    again.turn(T0 + MINUTE)
    assert again.deliver(T0 + MINUTE) == 1
    assert len(receiver.requests) == 1
    assert len(again.page(T0).alerts) == 1


def test_acknowledged_silenced_and_over(make, receiver):
    service = make(RULE + 'repeat = "1h"\n' + contact(receiver.url))
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    service.acknowledge(1, actor="operator", comment="on it", now_ms=T0)
    for hour in range(1, 30):
        service.turn(T0 + hour * 3_600_000)
    service.deliver(T0 + 10**9)
    assert len(receiver.requests) == 1
    assert service.view(1, T0).is_acknowledged
    service.now_signals[:] = [errors(0.0)]
    service.turn(T0 + 31 * 3_600_000)
    service.deliver(T0 + 10**9)
    assert [json.loads(body)["kind"] for _, body in receiver.requests] == ["firing", "resolved"]
    with pytest.raises(UsageError, match="is over"):
        service.acknowledge(1, actor="operator", now_ms=T0)
    assert [entry.action for entry in Audit(service._store).page(subject="alert:1").entries] == ["alert.acknowledged"]
    number = service.silence(Silence(matchers={"model": "kws"}, from_ms=T0, until_ms=T0 + 10**10), actor="operator", now_ms=T0)
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0 + 40 * 3_600_000)
    assert [alert.muted for alert in service.open_alerts()] == ["silenced"]
    service.end_silence(number, actor="operator", now_ms=T0 + 40 * 3_600_000)
    service.turn(T0 + 41 * 3_600_000)
    assert [alert.muted for alert in service.open_alerts()] == [""]
    assert [view.alert.id for view in service.page(T0).alerts] == [2, 1]


def test_alerts_over_postgres(make, receiver, postgres_url):
    service = make(RULE + contact(receiver.url), url=postgres_url)
    service.now_signals[:] = [errors(0.2)]
    service.sources.append(lambda now: store_signals(service._services, now))
    for turn in range(3):
        service.turn(T0 + turn * MINUTE)
        service.deliver(T0 + turn * MINUTE)
    service.acknowledge(1, actor="operator", now_ms=T0)
    assert len(receiver.requests) == 1
    assert service.view(1, T0).deliveries[0].status == "sent"


def test_rules_are_read_again_when_the_file_changes(make, tmp_path):
    service = make(RULE.replace('notify = "on-call"\n', ""))
    service.now_signals[:] = [errors(0.02)]
    service.turn(T0)
    assert service.open_alerts() == ()
    file = tmp_path / "rules.toml"
    file.write_text(file.read_text().replace("above = 0.05", "above = 0.005"))
    service.turn(T0 + MINUTE)
    assert len(service.open_alerts()) == 1
    file.write_text("[[rule]]\nnaem = 1\n")
    service.turn(T0 + 2 * MINUTE)
    assert "naem" in service.rules_error or "no name" in service.rules_error
    assert len(service.open_alerts()) == 1  # the former rules are in force


def test_alert_halts_a_real_rollout_once(make, tmp_path):
    world = FleetWorld(str(tmp_path / "fleet.db"), ["fine"] * 20)
    number = world.start(waves="canary:2,100%", is_rolled_back_on_halt=False)
    world.round()
    service = make(RULE.replace('notify = "on-call"\n', 'actions = ["halt-rollout"]\n'), url=str(tmp_path / "fleet.db"))
    service._services.rollouts, service._services.catalog = world.service, world.shelf
    service.now_signals[:] = [errors(0.2)]
    for turn in range(3):
        service.turn(world.now + turn * MINUTE)
    assert world.view(number).progress.state == "halted"
    assert world.view(number).progress.reason.startswith("alert 1: ")
    whats = [item.what for item in service.view(1, T0).timeline]
    assert whats.count("halt-rollout") == 1
    before = [device.serving for device in world.devices]
    for _ in range(10):
        world.round()
    assert [device.serving for device in world.devices] == before
    world.store.close()


def test_action_that_is_tried_only_is_written_down(make):
    rules = RULE.replace('notify = "on-call"\n', 'actions = ["halt-rollout"]\nis_dry_run = true\n')
    service = make(rules)
    service.now_signals[:] = [errors(0.2)]
    service.turn(T0)
    details = [item.detail for item in service.view(1, T0).timeline if item.what == "halt-rollout"]
    assert details == ["would halt-rollout kws (dry run)"]


def test_action_is_done_again_when_the_server_died_in_it(make, tmp_path):
    class Dying:
        calls = 0

        def halt(self, **_):
            Dying.calls += 1
            if Dying.calls == 1:
                raise KeyboardInterrupt
            return (7,)

    service = make(RULE.replace('notify = "on-call"\n', 'actions = ["halt-rollout"]\n'))
    service._services.rollouts = Dying()
    service.now_signals[:] = [errors(0.2)]
    with pytest.raises(KeyboardInterrupt):
        service.turn(T0)
    for turn in (1, 2, 3):
        service.turn(T0 + turn * MINUTE)
    assert Dying.calls == 2
    assert service.open_alerts()[0].actions_done == ("halt-rollout",)


def test_signals_of_the_store(make):
    service = make("")
    store = service._store
    batch = [Received(site="lab", device=f"cam-{n}", message=birth(boot=n + 1), received_ms=T0) for n in range(10)]
    batch += [
        Received(site="lab", device=f"cam-{n}", message=heartbeat(boot=n + 1, seq=1), received_ms=T0 + 400_000)
        for n in range(6)
    ]
    for n, kind in ((0, "install_finished"), (1, "install_finished"), (2, "install_refused"), (1, "rolled_back")):
        said = msgspec.structs.replace(
            event(boot=n + 1, seq=2 + (kind == "rolled_back")), kind=kind, model="kws", version="2", counter=2
        )
        batch.append(Received(site="lab", device=f"cam-{n}", message=said, received_ms=T0 + 400_000))
    store.apply(batch)
    now = max(T0 + 400_000, said.time_ms)
    found = {signal.name: signal for signal in store_signals(service._services, now)}
    assert (found["device.silent"].value, found["device.silent"].samples) == (0.4, 10)
    assert found["device.offline"].value == 0
    assert (found["install.failed_share"].value, found["install.failed_share"].samples) == (pytest.approx(1 / 3), 3)
    assert found["rolled_back.share"].value == 0.5


def test_source_that_fails_silences_no_other(make):
    service = make(RULE.replace('notify = "on-call"\n', ""))

    def broken(_now):
        raise RuntimeError

    service.sources = [broken, lambda _now: [errors(0.2)]]
    service.turn(T0)
    assert len(service.open_alerts()) == 1


def test_mail_by_apprise_reaches_a_real_smtp_server(make):
    mails = []

    class Smtp:
        async def __call__(self, reader, writer):
            writer.write(b"220 sink\r\n")
            data, in_data = b"", False
            while line := await reader.readline():
                if in_data:
                    data += line
                    if line == b".\r\n":
                        in_data = False
                        mails.append(data.decode())
                        writer.write(b"250 taken\r\n")
                elif line.upper().startswith(b"DATA"):
                    in_data, data = True, b""
                    writer.write(b"354 go on\r\n")
                elif line.upper().startswith(b"QUIT"):
                    writer.write(b"221 bye\r\n")
                    break
                else:
                    writer.write(b"250 sink\r\n")
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(Smtp(), "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    threading.Thread(target=loop.run_forever, daemon=True).start()
    try:
        service = make(RULE + contact(f"mailto://127.0.0.1:{port}?from=fleet@example.org&to=on-call@example.org&mode=insecure"))
        service.now_signals[:] = [errors(0.2)]
        service.turn(T0)
        assert service.deliver(T0) == 1
        wait_until(lambda: mails)
        assert "on-call@example.org" in mails[0]
        assert "critical" in mails[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)


@pytest.mark.skipif(not shutil.which("prometheus-alertmanager"), reason="prometheus-alertmanager is not installed")
def test_alertmanager_takes_and_ends_it(make, tmp_path):
    port = free_port()
    (tmp_path / "am.yml").write_text("route:\n  receiver: none\nreceivers:\n  - name: none\n")
    arguments = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.path={tmp_path / 'am'}", "--cluster.listen-address="]
    with (tmp_path / "am.log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus-alertmanager", f"--config.file={tmp_path / 'am.yml'}", *arguments], stdout=log, stderr=log
        )
    try:

        def ready():
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1).status == 200
            except OSError:
                return False

        wait_until(ready, seconds=30)
        service = make(RULE + contact(f"alertmanager+http://127.0.0.1:{port}"))
        now = time.time_ns() // 1_000_000
        service.now_signals[:] = [errors(0.2)]
        service.turn(now)
        assert service.deliver(now) == 1

        def held():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/alerts", timeout=5) as answer:
                return json.load(answer)

        wait_until(held)
        (alert,) = held()
        assert alert["labels"] == {"alertname": "errors", "severity": "critical", "model": "kws", "version": "2.0.0"}
        service.now_signals[:] = [errors(0.0)]
        service.turn(now + 1)
        assert service.deliver(now + 1) == 1
        wait_until(lambda: not held())
    finally:
        process.terminate()
        process.wait(20)


def test_addresses_are_shown_without_their_secrets():
    assert shown("webhook+https://u:p@h.example:8443/T/B?k=1") == "webhook+https://h.example:8443/…"
    assert shown("tgram://123:abc/456") == "tgram://…"
    assert shown("nonsense") == "…"


def test_unknown_scheme_is_named(make):
    service = make(RULE + contact("nosuch://x"))
    with pytest.raises((UsageError, EnvironmentFault)):
        service.courier.deliver(service.book.contact("on-call"), 0, _message(service))


def _message(service):
    from edgekit.fleet.alerting.delivery import make_message
    from edgekit.fleet.alerting.engine import Alert

    return make_message(Alert(rule="r", labels={}, level="info", state="firing"), "firing", number=1)
