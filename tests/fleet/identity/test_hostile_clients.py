"""A real Mosquitto with the configuration that edgekit makes, and clients that want what is not theirs (F22)."""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgekit.telemetry.topics import UPLINK
from tests.agent.broker_world import needs_mosquitto
from tests.agent.world import wait_for

pytestmark = [needs_mosquitto, pytest.mark.fault("F22")]
DENIED = "Not authorized"


def test_device_says_its_own_verbs_and_nothing_else(fleet, broker):
    server, device = broker.server(), broker.client(fleet.pair())
    server.listen("ek/1/#")
    for verb in (*UPLINK, "rsp"):
        assert device.say(f"ek/1/lab/cam-7/{verb}") == "Success", verb
    for topic in (
        "ek/1/lab/cam-7/des",
        "ek/1/lab/cam-7/cmd",
        "ek/1/lab/cam-8/w",
        "ek/1/yard/cam-7/w",
        "ek/1/lab/cam-7/w/more",
        "ek/1/lab/cam-7",
        "ek/1/cam-7/w",
        "other",
    ):
        assert device.say(topic) == DENIED, topic
    wait_for(lambda: len(server.heard) == len(UPLINK) + 1, what="what it may say")


def test_device_hears_its_own_orders_only(fleet, broker):
    server = broker.server()
    one, other = broker.client(fleet.pair("lab", "cam-7")), broker.client(fleet.pair("lab", "cam-8"))
    one.listen("ek/1/lab/cam-7/des", "ek/1/lab/cam-7/cmd")
    other.listen("ek/1/lab/cam-7/des", "ek/1/+/+/des", "#", "ek/1/#", "$SYS/#", "$share/g/ek/1/+/+/w")
    for topic in ("ek/1/lab/cam-7/des", "ek/1/lab/cam-7/cmd", "ek/1/lab/cam-7/w", "ek/1/lab/cam-8/des"):
        assert server.say(topic, topic.encode()) == "Success"
    wait_for(lambda: len(one.heard) == 2, what="its orders")
    wait_for(lambda: other.heard, what="the other's order")
    assert {topic for topic, *_ in one.heard} == {"ek/1/lab/cam-7/des", "ek/1/lab/cam-7/cmd"}
    assert {topic for topic, *_ in other.heard} == {"ek/1/lab/cam-8/des"}


def test_stolen_client_id_takes_nobodys_session(fleet, broker):
    server = broker.server("edgekit-fleet")
    victim = broker.client(fleet.pair("lab", "cam-7"), client_id="ek.lab.cam-7")
    victim.listen("ek/1/lab/cam-7/des")
    thief = fleet.pair("lab", "cam-8")
    for stolen in ("ek.lab.cam-7", "lab/cam-7", "edgekit-fleet"):
        robber = broker.client(thief, client_id=stolen)
        assert robber.is_let_in()
        robber.leave()
    server.say("ek/1/lab/cam-7/des", b"for you")
    wait_for(lambda: victim.heard, what="what is the victim's")
    assert victim.ends == []
    assert server.ends == []


def test_foreign_will_is_not_published(fleet, broker):
    server = broker.server()
    server.listen("ek/1/#")
    foreign = broker.client(fleet.pair("lab", "cam-8"), will=("ek/1/lab/cam-7/status", b"dead"))
    own = broker.client(fleet.pair("lab", "cam-9"), will=("ek/1/lab/cam-9/status", b"dead"))
    assert foreign.is_let_in()
    assert own.is_let_in()
    foreign.drop()
    own.drop()
    wait_for(lambda: server.heard, what="the will that is allowed")
    time.sleep(0.3)
    assert [topic for topic, *_ in server.heard] == ["ek/1/lab/cam-9/status"]


def test_retained_poison_of_another_device_does_not_stay(fleet, broker):
    poisoner = broker.client(fleet.pair("lab", "cam-8"))
    assert poisoner.say("ek/1/lab/cam-7/des", b"run this", retain=True) == DENIED
    assert poisoner.say("ek/1/lab/cam-7/status", b"born", retain=True) == DENIED
    victim, server = broker.client(fleet.pair("lab", "cam-7")), broker.server()
    victim.listen("ek/1/lab/cam-7/des")
    server.listen("ek/1/lab/cam-7/status")
    assert server.say("ek/1/lab/cam-7/des", b"real") == "Success"
    wait_for(lambda: victim.heard, what="the real order")
    assert [payload for _, payload, _ in victim.heard] == [b"real"]
    assert server.heard == []


def test_device_does_not_get_in_by_the_servers_door(fleet, broker):
    intruder = broker.client(fleet.pair(), port=broker.server_port, client_id="edgekit-fleet")
    assert not intruder.is_let_in()


def test_server_certificate_does_not_get_in_by_the_devices_door(fleet, broker):
    cert, key = fleet.server_pair("lab-cam", is_client=True)
    assert not broker.client(cert, key=key).is_let_in()


def test_certificate_of_a_server_that_is_no_client_opens_no_door(fleet, broker):
    cert, key = fleet.server_pair("edgekit-fleet", is_client=False)
    assert not broker.client(cert, key=key, port=broker.server_port).is_let_in()


def test_server_of_another_name_may_nothing(fleet, broker):
    cert, key = fleet.server_pair("reporting", is_client=True)
    other = broker.client(cert, key=key, port=broker.server_port)
    assert other.is_let_in()
    assert other.say("ek/1/lab/cam-7/des") == DENIED


def test_two_connections_of_one_server_do_not_push_each_other_out(fleet, broker):
    ingest, publisher = broker.server("edgekit-fleet"), broker.server("edgekit-fleet-publisher")
    time.sleep(0.3)
    assert ingest.client.is_connected()
    assert publisher.client.is_connected()


def test_revoked_device_is_mute_at_once_and_not_let_in_again(fleet, broker):
    pair = fleet.pair()
    device, server = broker.client(pair), broker.server()
    device.listen("ek/1/lab/cam-7/des")
    assert device.say("ek/1/lab/cam-7/w") == "Success"
    server.listen("ek/1/lab/cam-7/w")
    assert fleet.identity.revoke("lab", "cam-7", reason="stolen", actor="operator") == 1
    broker.reload()
    wait_for(lambda: device.say("ek/1/lab/cam-7/w", b"after") == DENIED, what="the new rules")
    heard = len(server.heard)
    server.say("ek/1/lab/cam-7/des", b"secret")
    device.say("ek/1/lab/cam-7/w", b"after")
    assert device.heard == []
    assert len(server.heard) == heard
    device.leave()
    assert not broker.client(pair).is_let_in()
    assert broker.client(fleet.pair("lab", "cam-8")).is_let_in()


def test_device_that_is_enrolled_again_after_its_revocation_is_let_in(fleet, broker):
    old = fleet.pair()
    fleet.identity.revoke("lab", "cam-7", reason="lost", actor="operator")
    new = fleet.pair()
    broker.reload()
    wait_for(lambda: not broker.client(old).is_let_in(), what="the new list")
    device = broker.client(new)
    assert device.is_let_in()
    assert device.say("ek/1/lab/cam-7/w") == "Success"


def test_expired_certificate_is_not_let_in(fleet, broker):
    fleet.clock.forward(days=-31)
    pair = fleet.pair()
    assert not broker.client(pair).is_let_in()


def test_selfmade_certificate_of_a_devices_name_is_not_let_in(fleet, broker, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab/cam-7")])
    for issuer in (subject, fleet.authority.devices.subject):
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(7)
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        path = tmp_path / "selfmade.pem"
        path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            + made.public_bytes(serialization.Encoding.PEM)
        )
        assert not broker.client(path).is_let_in()


def test_what_the_broker_kept_over_its_own_restart_reaches_the_server(fleet, broker):
    device = broker.client(fleet.pair())
    assert device.say("ek/1/lab/cam-7/rep", b"state", retain=True) == "Success"
    device.leave()
    broker.kill(signal.SIGTERM)
    broker.log.write_text("")
    broker.start()
    server = broker.server()
    server.listen("ek/1/#")
    wait_for(lambda: server.heard, what="the retained state")
    assert server.heard == [("ek/1/lab/cam-7/rep", b"state", True)]


def test_rules_of_the_operator_are_kept_beside_those_of_the_fleet(fleet, broker):
    (broker.folder / "acl.local").write_text("pattern write sensors/%u/#\n")
    device = broker.client(fleet.pair())
    fleet.identity.publish_revocations()  # as the job does, every half minute
    broker.reload()
    wait_for(lambda: device.say("sensors/lab/cam-7/x") == "Success", what="the new rules")
    assert device.say("sensors/lab/cam-8/x") == DENIED
