"""Renewal and revocation: by the present key alone, over the API as a device reaches it, through power cuts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import msgspec
import pytest

from edgekit.agent.certificates import CERTIFICATE, make_request, read_certificates
from edgekit.agent.config import load_config
from edgekit.agent.enrolment import FleetServer, find_server, renew
from edgekit.agent.identity import NEXT_KEY, IdentityFiles
from edgekit.agent.renewal import REFUSED_S, Renewer, due_at
from edgekit.errors import EdgekitError, EnvironmentFault, TrustError, UsageError
from edgekit.fleet.audit import Audit
from edgekit.fleet.identity.service import MAX_CERTIFICATES_A_DAY
from edgekit.schema.identity import Enrolment
from edgekit.trust import der
from edgekit.trust.p256 import PrivateKey
from tests.agent.world import wait_for
from tests.fleet.identity.identity_world import Api, Fleet, make_renewal


class Heard:
    """A journal's part that the renewer uses."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, kind, detail="", *, error=None, **_more):
        self.events.append((kind, error.code if error else ""))


@pytest.fixture
def enrolled(fleet, api, tmp_path):
    about, _ = api.enrol(tmp_path / "state", fleet.claim())
    return SimpleNamespace(files=IdentityFiles.of(tmp_path / "state"), about=about, state=tmp_path / "state")


def refused(work, kind=TrustError) -> str:
    with pytest.raises(kind) as caught:
        work()
    return caught.value.code


# --- at the device


def test_enrolled_device_has_a_private_pair_that_fits_and_its_fleets_authority(fleet, enrolled):
    files = enrolled.files
    assert files.pair.stat().st_mode & 0o777 == 0o600
    assert files.folder.stat().st_mode & 0o777 == 0o700
    assert files.authorities.read_text() == fleet.authority.servers_pem
    assert not (files.folder / NEXT_KEY).exists()
    assert files.certificate().common_name == "lab/cam-7"
    config = load_config(None, flags={"state_dir": str(enrolled.state)}, environ={})
    assert (config.site, config.device, config.broker) == ("lab", "cam-7", "mqtts://broker")
    assert (config.cert_file, config.ca_file) == (str(files.pair), str(files.authorities))


def test_settings_that_name_another_device_are_refused(enrolled):
    with pytest.raises(UsageError) as caught:
        load_config(None, flags={"state_dir": str(enrolled.state), "device": "cam-8"}, environ={})
    assert caught.value.code == "config.identity"
    assert "cam-8" in caught.value.message
    settings = {"state_dir": str(enrolled.state), "device": "cam-7", "cert_file": "/etc/own.pem", "ca_file": "/etc/ca.pem"}
    config = load_config(None, flags=settings, environ={})
    assert (config.cert_file, config.ca_file) == ("/etc/own.pem", "/etc/ca.pem")


def test_renewal_brings_a_new_key_and_the_old_pair_is_gone(enrolled):
    before = enrolled.files.certificate()
    after = renew(enrolled.files, enrolled.about)
    assert after.key_info != before.key_info
    assert after.common_name == before.common_name
    assert enrolled.files.certificate() == after
    assert enrolled.files.key().secret != 0


@pytest.mark.parametrize("step", ["before asking", "answer lost", "before the pair", "after the pair"])
def test_power_cut_in_a_renewal_leaves_a_pair_that_works_and_the_next_one_ends_it(fleet, enrolled, monkeypatch, step):
    files, before = enrolled.files, enrolled.files.certificate()

    class Cut(Exception):  # noqa: N818 - no error, the end
        pass

    def cut(*_args, **_more):
        raise Cut

    real_ask = FleetServer.ask
    with monkeypatch.context() as patched:
        if step == "before asking":
            patched.setattr(FleetServer, "ask", cut)
        elif step == "answer lost":
            patched.setattr(FleetServer, "ask", lambda *args: (real_ask(*args), cut())[0])
        elif step == "before the pair":
            patched.setattr(IdentityFiles, "take", cut)
        else:
            patched.setattr("pathlib.Path.unlink", cut)
        with pytest.raises(Cut):
            renew(files, enrolled.about)
    held = files.certificate()
    assert (held == before) == (step != "after the pair")
    assert files.read() == enrolled.about
    pending = PrivateKey.from_pem((files.folder / NEXT_KEY).read_bytes())
    after = renew(files, enrolled.about)
    assert after.key_info != before.key_info
    if step in {"answer lost", "before the pair"}:
        assert files.key() == pending
        assert len(fleet.identity.page().identities) == 1
    assert not (files.folder / NEXT_KEY).exists()


def test_renewer_waits_for_two_thirds_and_tells_the_fleet(fleet, enrolled):
    heard, now = Heard(), fleet.clock
    renewer = Renewer(enrolled.files, enrolled.about, heard, now=now)
    first = enrolled.files.certificate()
    assert asyncio.run(renewer.look()) > 0
    assert heard.events == []
    now.now = due_at(first) + timedelta(seconds=1)
    assert timedelta(days=20) <= now.now - first.not_before <= timedelta(days=24)
    asyncio.run(renewer.look())
    assert heard.events == [("certificate_renewed", "")]
    assert enrolled.files.certificate().not_after > first.not_after
    asyncio.run(renewer.look())
    assert len(heard.events) == 1


def test_renewer_goes_on_when_the_server_is_away_and_says_so_once(fleet, api, enrolled):
    heard = Heard()
    api.close()
    renewer = Renewer(enrolled.files, enrolled.about, heard, now=lambda: fleet.clock() + timedelta(days=25))
    waits = [asyncio.run(renewer.look()) for _ in range(3)]
    assert all(60.0 <= wait <= 4 * 3600.0 for wait in waits)
    assert heard.events == [("certificate_not_renewed", "fleet.unreachable")]
    assert enrolled.files.certificate().common_name == "lab/cam-7"


def test_revoked_device_gets_no_certificate_and_asks_once_a_day(fleet, enrolled):
    fleet.identity.revoke("lab", "cam-7", reason="stolen", actor="operator")
    heard = Heard()
    renewer = Renewer(enrolled.files, enrolled.about, heard, now=lambda: fleet.clock() + timedelta(days=25))
    assert asyncio.run(renewer.look()) == REFUSED_S
    assert heard.events == [("certificate_not_renewed", "identity.revoked")]


def test_new_authority_of_the_servers_comes_with_a_renewal(fleet, enrolled):
    (fleet.folder / "next").mkdir()
    following = Fleet(fleet.folder / "next")
    both = fleet.authority.servers_pem + following.authority.servers_pem
    object.__setattr__(fleet.authority, "servers", fleet.authority.servers + following.authority.servers)
    renew(enrolled.files, enrolled.about)
    assert enrolled.files.authorities.read_text() == both
    following.close()


def test_running_agent_renews_by_itself(tmp_path):
    (tmp_path / "fleet").mkdir()
    fleet = Fleet(tmp_path / "fleet", certificate_days=1 / 1440)  # begins five minutes ago: due at once
    api, state = Api(fleet), tmp_path / "state"
    api.enrol(state, fleet.claim())
    before = IdentityFiles.of(state).certificate()
    command = [sys.executable, "-m", "edgekit", "agent", "run", "--state-dir", str(state), "--port", "0"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        agent = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        wait_for(lambda: "event=certificate_renewed" in log.read_text(), what="the renewal")
    finally:
        agent.terminate()
        agent.wait(15)
    assert IdentityFiles.of(state).certificate().key_info != before.key_info
    assert Audit(fleet.store).page(actor="device:lab/cam-7").entries[0].action == "identity.renewed"
    api.close()
    fleet.close()


# --- at the first contact


def test_other_fingerprint_and_other_authority_are_not_believed(fleet, api, tmp_path):
    claim = fleet.claim()
    wrong = "sha256:" + "0" * 64
    assert refused(lambda: find_server(api.url, fingerprint=wrong)) == "fleet.fingerprint"
    assert refused(lambda: find_server(api.url, fingerprint="md5:1"), UsageError) == "fleet.fingerprint"
    assert refused(lambda: find_server("http://fleet.example.com", fingerprint=""), UsageError) == "config.insecure"
    assert refused(lambda: find_server("ftp://x", fingerprint=""), UsageError) == "fleet.url"
    for authorities in ("", (fleet.authority.folder / "devices.pem").read_text()):
        server = find_server(api.url, authorities=authorities)
        asked = Enrolment(claim=claim, request=make_request(PrivateKey.generate(), ""))
        assert refused(lambda server=server, asked=asked: server.ask("/enroll", asked)) == "fleet.tls"
    other = find_server(api.url.replace("localhost", "127.0.0.1"), fingerprint=fleet.authority.fingerprint)
    assert refused(lambda: other.ask("/enroll", asked)) == "fleet.tls"
    about, _ = api.enrol(tmp_path / "state", claim)  # nobody saw the claim so far
    assert about.device == "cam-7"


def test_wrong_claim_leaves_the_identity_that_was_there(fleet, api, enrolled):
    before = enrolled.files.pair.read_bytes()
    assert refused(lambda: api.enrol(enrolled.state, "a.b")) == "claim.refused"
    assert enrolled.files.pair.read_bytes() == before
    assert enrolled.files.read() == enrolled.about


def test_answer_for_another_key_or_device_is_not_taken(fleet, api, tmp_path, monkeypatch):
    claim = fleet.claim()
    real = FleetServer.ask
    other = fleet.identity.enrol(Enrolment(claim=fleet.claim("lab", "b"), request=make_request(PrivateKey.generate(), "")))
    monkeypatch.setattr(FleetServer, "ask", lambda *_: other)
    assert refused(lambda: api.enrol(tmp_path / "s", claim)) == "identity.mismatch"
    monkeypatch.setattr(FleetServer, "ask", lambda *args: msgspec.structs.replace(real(*args), device="other"))
    assert refused(lambda: api.enrol(tmp_path / "s", claim)) == "identity.mismatch"
    assert IdentityFiles.of(tmp_path / "s").read() is None


def test_enrolment_that_was_cut_between_its_files_is_told(enrolled):
    about = msgspec.structs.replace(enrolled.about, device="cam-8")
    (enrolled.files.folder / "identity.json").write_bytes(msgspec.json.encode(about))
    assert refused(enrolled.files.read, UsageError) == "identity.unfinished"


# --- at the server


@pytest.fixture
def first(fleet):
    key = PrivateKey.generate()
    issued = fleet.identity.enrol(Enrolment(claim=fleet.claim(), request=make_request(key, "")))
    return SimpleNamespace(key=key, pem=issued.certificate)


def test_renewal_without_the_present_key_is_refused(fleet, first):
    thief = PrivateKey.generate()
    assert refused(lambda: fleet.identity.renew(make_renewal(first.pem, thief))) == "identity.refused"
    good = make_renewal(first.pem, first.key)
    swapped = msgspec.structs.replace(good, request=make_request(thief, ""))
    assert refused(lambda: fleet.identity.renew(swapped)) == "identity.refused"
    flipped = msgspec.structs.replace(good, signature=good.signature[:-1] + bytes([good.signature[-1] ^ 1]))
    assert refused(lambda: fleet.identity.renew(flipped)) == "identity.refused"
    nothing = msgspec.structs.replace(good, certificate="x")
    assert refused(lambda: fleet.identity.renew(nothing)) == "identity.refused"
    assert fleet.identity.renew(good).device == "cam-7"


def test_certificate_of_another_fleet_or_of_a_server_renews_nothing(fleet, first, tmp_path):
    (tmp_path / "other").mkdir()
    other = Fleet(tmp_path / "other")
    stranger = other.pair().read_text()
    foreign = make_renewal(read_pem(stranger), PrivateKey.from_pem(stranger))
    assert refused(lambda: fleet.identity.renew(foreign)) == "identity.refused"
    cert, key = fleet.server_pair("fleet", is_client=True)
    server = make_renewal(cert.read_text(), PrivateKey.from_pem(key.read_text()))
    assert refused(lambda: fleet.identity.renew(server)) == "identity.refused"
    other.close()


def read_pem(pair: str) -> str:
    (facts,) = read_certificates(pair)
    return der.to_pem(facts.raw, CERTIFICATE)


def test_same_key_again_is_no_renewal(fleet, first):
    with pytest.raises(EdgekitError) as caught:
        fleet.identity.renew(make_renewal(first.pem, first.key, first.key))
    assert caught.value.code == "identity.request"


def test_device_that_slept_may_renew_late_and_not_too_late(fleet, first):
    fleet.clock.forward(days=30 + 59)
    assert fleet.identity.page(state="expired").identities[0].device == "cam-7"
    late = fleet.identity.renew(make_renewal(first.pem, first.key))
    assert late.not_after > fleet.clock.now
    fleet.clock.forward(days=2)
    assert refused(lambda: fleet.identity.renew(make_renewal(first.pem, first.key))) == "identity.expired"


def test_superseded_certificate_renews_nothing(fleet, first):
    fleet.identity.enrol(Enrolment(claim=fleet.claim(), request=make_request(PrivateKey.generate(), "")))
    assert refused(lambda: fleet.identity.renew(make_renewal(first.pem, first.key))) == "identity.revoked"


def test_certificate_that_a_restored_database_does_not_know_is_renewed(fleet, first, tmp_path):
    (tmp_path / "restored").mkdir()
    restored = Fleet(tmp_path / "restored")
    object.__setattr__(restored.identity, "authority", fleet.authority)
    assert restored.identity.renew(make_renewal(first.pem, first.key)).device == "cam-7"
    assert restored.identity.page().identities[0].device == "cam-7"
    restored.close()


def test_device_that_asks_again_and_again_is_stopped_for_the_day(fleet, first):
    for _ in range(MAX_CERTIFICATES_A_DAY - 1):
        fleet.identity.renew(make_renewal(first.pem, first.key))
    assert refused(lambda: fleet.identity.renew(make_renewal(first.pem, first.key)), EdgekitError) == "identity.too_often"
    fleet.clock.forward(days=1, minutes=1)
    assert fleet.identity.renew(make_renewal(first.pem, first.key)).device == "cam-7"


def test_identities_are_listed_with_their_states_page_by_page(fleet):
    for number in range(5):
        fleet.pair("lab", f"cam-{number}")
    fleet.identity.revoke("lab", "cam-1", reason="broken", actor="operator")
    first = fleet.identity.page(limit=3)
    second = fleet.identity.page(limit=3, after=first.next)
    assert [view.device for view in (*first.identities, *second.identities)] == [f"cam-{number}" for number in range(5)]
    assert second.next == ""
    assert [view.device for view in fleet.identity.page(state="revoked").identities] == ["cam-1"]
    assert fleet.identity.page(search="cam-4").identities[0].state == "valid"
    fleet.clock.forward(days=22)
    assert len(fleet.identity.page(state="due").identities) == 4
    assert fleet.identity.page(state="valid").identities == ()
    fleet.clock.forward(days=9)
    assert {view.state for view in fleet.identity.page().identities} == {"expired", "revoked"}


def test_revocation_wants_a_reason_and_a_device_that_is_known(fleet):
    assert refused(lambda: fleet.identity.revoke("lab", "cam-7", reason="x", actor="a"), UsageError) == "identity.unknown"
    fleet.pair()
    assert refused(lambda: fleet.identity.revoke("lab", "cam-7", reason=" ", actor="a"), UsageError) == "identity.reason"
    claim = fleet.claim()
    fleet.identity.revoke("lab", "cam-7", reason="stolen", actor="a")
    with pytest.raises(TrustError):  # an open claim of the device does not outlive its revocation
        fleet.identity.enrol(Enrolment(claim=claim, request=make_request(PrivateKey.generate(), "")))


def test_server_that_does_not_answer_is_told(enrolled):
    about = msgspec.structs.replace(enrolled.about, fleet="https://127.0.0.1:1")
    assert refused(lambda: renew(enrolled.files, about), EnvironmentFault) == "fleet.unreachable"
