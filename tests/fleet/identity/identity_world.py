"""A fleet with a certificate authority: its store, its API over TLS in a thread, its Mosquitto, and devices with identities."""

from __future__ import annotations

import signal
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import paho.mqtt.client as paho
import uvicorn
from fastapi import FastAPI, Request

from edgekit.agent.certificates import CERTIFICATE, REQUEST, make_request
from edgekit.agent.enrolment import enrol, find_server
from edgekit.agent.identity import IdentityFiles
from edgekit.fleet.access.guard import LOCAL
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.identity.api import make_router
from edgekit.fleet.identity.authority import init_authority
from edgekit.fleet.identity.mosquitto import BrokerSettings, make_acl, make_config
from edgekit.fleet.identity.service import Identity
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.services import Services
from edgekit.fleet.store import Store
from edgekit.schema.identity import Enrolment, Renewal, renewal_bytes
from edgekit.trust import der
from edgekit.trust.p256 import PrivateKey
from edgekit.trust.tls import ServerTls
from tests.agent.broker_world import MOSQUITTO
from tests.agent.world import free_port, wait_for

HOSTS = ("localhost", "127.0.0.1")
DAY_S = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **span) -> None:
        self.now += timedelta(**span)


class Fleet:
    """Authority, store and service; the clock is ours."""

    def __init__(self, folder: Path, url: str = "", **settings) -> None:
        self.folder, self.clock = folder, Clock()
        self.authority = init_authority(folder / "ca", name="test fleet", now=self.clock.now, **settings)
        self.store = Store(url or f"sqlite:///{folder / 'fleet.db'}")
        self.broker_dir = folder / "broker"
        self.identity = Identity(
            store=self.store, authority=self.authority, broker_dir=self.broker_dir, now=self.clock, broker="mqtts://broker"
        )
        self.broker_dir.mkdir()

    def claim(self, site: str = "lab", device: str = "cam-7", **given) -> str:
        given = {"labels": {}, "seconds": DAY_S, "actor": "operator"} | given
        return self.identity.make_claim(site, device, **given).claim

    def pair(self, site: str = "lab", device: str = "cam-7") -> Path:
        """A device's key and certificate in one file, by the real way."""
        key = PrivateKey.generate()
        issued = self.identity.enrol(Enrolment(claim=self.claim(site, device), request=make_request(key, "")))
        path = self.folder / f"{site}.{device}.{key.public[0]:x}.pem"
        path.write_text(key.to_pem() + issued.certificate)
        return path

    def server_pair(self, name: str = "server", *, hosts=HOSTS, is_client: bool = False) -> tuple[Path, Path]:
        return self.authority.issue_server(
            name, hosts=hosts, is_client=is_client, days=30, now=datetime.now(UTC).replace(microsecond=0)
        )

    def close(self) -> None:
        self.store.close()


class Api:
    """The identity's API over TLS, as a device reaches it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        cert, key = fleet.server_pair("api", hosts=("localhost",))
        config = FleetConfig()
        services = Services(config=config, store=fleet.store, jobs=Jobs(fleet.store, owner="test"), identity=fleet.identity)
        app = FastAPI()

        @app.middleware("http")
        async def local(request: Request, call_next):
            request.state.actor = LOCAL
            return await call_next(request)

        app.include_router(make_router(services))
        self.port = free_port()
        settings = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning", timeout_graceful_shutdown=1)
        settings.load()
        settings.ssl = ServerTls(cert=cert, key=key).context()
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started, what="the API")

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def enrol(self, state_dir: Path, claim: str, **given):
        server = find_server(self.url, fingerprint=self.fleet.authority.fingerprint)
        return enrol(server, claim=claim, files=IdentityFiles.of(state_dir), **given)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


class Broker:
    """Mosquitto with the configuration that edgekit makes."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.folder, self.data = fleet, fleet.broker_dir, fleet.folder / "data"
        self.data.mkdir()
        self.port, self.server_port = free_port(), free_port()
        settings = BrokerSettings(
            folder=str(self.folder),
            data=str(self.data),
            address="127.0.0.1",
            device_port=self.port,
            server_port=self.server_port,
            user="root",
        )
        cert, key = fleet.server_pair("broker")
        for name, content in {
            "mosquitto.conf": make_config(settings),
            "acl": make_acl(("edgekit-fleet",)),
            "ca.pem": fleet.authority.servers_pem,
            "devices.pem": (fleet.authority.folder / "devices.pem").read_text(),
            "broker.pem": cert.read_text(),
            "broker.key": key.read_text(),
        }.items():
            (self.folder / name).write_text(content)
        fleet.identity.publish_revocations()
        self.process: subprocess.Popen | None = None
        self.log = fleet.folder / "mosquitto.log"

    def start(self) -> Broker:
        assert MOSQUITTO is not None
        with self.log.open("ab") as log:
            command = [MOSQUITTO, "-c", str(self.folder / "mosquitto.conf")]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: "running" in self.log.read_text(), what="the broker", seconds=10)
        return self

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def client(self, pair: Path, *, key: Path | None = None, port: int = 0, client_id: str = "x", **connecting) -> Client:
        return Client(self, pair, key, port or self.port, client_id, **connecting)

    def server(self, client_id: str = "edgekit-fleet") -> Client:
        cert, key = self.fleet.server_pair("edgekit-fleet", is_client=True)
        made = self.client(cert, key=key, port=self.server_port, client_id=client_id)
        assert made.is_let_in()
        return made


class Client:
    """Somebody at the broker; keeps what it hears and what became of what it said."""

    def __init__(
        self, broker: Broker, pair: Path, key: Path | None, port: int, client_id: str, *, will: tuple[str, bytes] | None = None
    ) -> None:
        self.heard: list[tuple[str, bytes, bool]] = []
        self.answers: dict[int, str] = {}
        self.ends: list[str] = []
        self.subscribed = threading.Event()
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        context = ssl.create_default_context(cafile=str(broker.folder / "ca.pem"))
        context.load_cert_chain(pair, key)
        self.client.tls_set_context(context)
        self.client.on_message = lambda _c, _d, m: self.heard.append((m.topic, bytes(m.payload), bool(m.retain)))
        self.client.on_publish = lambda _c, _d, mid, reason, _p: self.answers.__setitem__(mid, str(reason))
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.on_disconnect = lambda _c, _d, _f, reason, _p: self.ends.append(str(reason))
        if will is not None:
            self.client.will_set(*will, qos=1, retain=True)
        self.error = ""
        try:
            self.client.connect("localhost", port)
        except OSError as error:
            self.error = str(error)
            return
        self.client.loop_start()

    def is_let_in(self) -> bool:
        """Whether the broker took it; decided when it is connected, or when the connection ended."""
        if self.error:
            return False
        wait_for(lambda: self.client.is_connected() or bool(self.ends), what="an answer of the broker")
        return self.client.is_connected()

    def say(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        mid = self.client.publish(topic, payload, qos=1, retain=retain).mid
        wait_for(lambda: mid in self.answers, what="the PUBACK")
        answer = self.answers[mid]
        return "Success" if answer == "No matching subscribers" else answer

    def listen(self, *filters: str) -> None:
        for each in filters:
            self.subscribed.clear()
            self.client.subscribe(each, qos=1)
            assert self.subscribed.wait(5)

    def drop(self) -> None:
        """Lose the connection without a goodbye."""
        self.client.loop_stop()
        self.client.socket().close()

    def leave(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def make_renewal(certificate: str, key: PrivateKey, following: PrivateKey | None = None) -> Renewal:
    """A request for the next certificate, signed with a key."""
    request = make_request(following or PrivateKey.generate(), "")
    (present,), (asked,) = der.from_pem(certificate, CERTIFICATE), der.from_pem(request, REQUEST)
    return Renewal(certificate=certificate, request=request, signature=key.sign(renewal_bytes(present, asked)))
