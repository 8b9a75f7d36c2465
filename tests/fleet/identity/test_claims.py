"""Claims: once, in time, for one device; and nothing is said of what was wrong."""

from __future__ import annotations

import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from sqlalchemy import select

from edgekit.agent.certificates import make_request, read_certificates
from edgekit.errors import EdgekitError, TrustError, UsageError
from edgekit.fleet.audit import Audit
from edgekit.fleet.identity.service import Identity
from edgekit.fleet.identity.tables import claims
from edgekit.fleet.store import Store
from edgekit.schema.identity import Enrolment
from edgekit.trust.p256 import PrivateKey
from tests.fleet.identity.identity_world import Fleet, make_renewal


@pytest.fixture
def fleet(tmp_path, database_url):
    """On SQLite and on PostgreSQL."""
    made = Fleet(tmp_path, database_url)
    yield made
    made.close()


def ask(fleet: Fleet, claim: str, key: PrivateKey | None = None, **given):
    request = make_request(key or PrivateKey.generate(), "who/knows")
    return fleet.identity.enrol(Enrolment(claim=claim, request=request, **given))


def refusal(fleet: Fleet, claim: str, **given) -> tuple[str, str, str]:
    with pytest.raises(TrustError) as caught:
        ask(fleet, claim, **given)
    return caught.value.code, caught.value.message, caught.value.hint


def test_certificate_is_for_the_device_of_the_claim_whatever_the_request_says(fleet):
    claim = fleet.claim(labels={"room": "a"})
    issued = ask(fleet, claim)
    (facts,) = read_certificates(issued.certificate)
    assert facts.common_name == "lab/cam-7"
    assert (issued.site, issued.device, issued.labels, issued.broker) == ("lab", "cam-7", {"room": "a"}, "mqtts://broker")
    made = x509.load_pem_x509_certificate(issued.certificate.encode())
    made.verify_directly_issued_by(fleet.authority.devices)
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_claim_counts_once(fleet):
    claim = fleet.claim()
    ask(fleet, claim)
    assert refusal(fleet, claim)[0] == "claim.refused"


def test_lost_answer_is_given_again_to_the_same_key_only(fleet):
    claim, key = fleet.claim(), PrivateKey.generate()
    first = ask(fleet, claim, key)
    assert ask(fleet, claim, key) == first
    refusal(fleet, claim)
    fleet.clock.forward(days=2)
    refusal(fleet, claim)
    with pytest.raises(TrustError):
        ask(fleet, claim, key)


def test_every_wrong_claim_gets_the_same_answer(fleet):
    good = fleet.claim("lab", "cam-1")
    used, late, withdrawn = fleet.claim("lab", "cam-2"), fleet.claim("lab", "cam-3", seconds=60), fleet.claim("lab", "cam-4")
    ask(fleet, used)
    assert fleet.identity.withdraw_claim(withdrawn.partition(".")[0], actor="operator")
    fleet.clock.forward(minutes=2)
    name, _, secret = good.partition(".")
    wrong = [
        "",
        ".",
        "x",
        name,
        f"{name}.",
        f"{name}.{secret[:-1]}",
        f"{name}.{secret}x",
        f"aaaaaaaaaaaaa.{secret}",
        f"{name}.{used.partition('.')[2]}",
        used,
        late,
        withdrawn,
    ]
    answers = {refusal(fleet, claim) for claim in wrong}
    answers |= {refusal(fleet, good, site="yard"), refusal(fleet, good, device="cam-9")}
    assert len(answers) == 1
    assert ask(fleet, good, site="lab", device="cam-1").device == "cam-1"


def test_of_many_at_once_at_two_servers_one_gets_the_certificate(fleet, database_url):
    count, claim = 8, fleet.claim()
    store = Store(database_url)
    second = Identity(store=store, authority=fleet.authority, now=fleet.clock)
    barrier, got, refused = threading.Barrier(count), [], []

    def run(server: Identity):
        request = make_request(PrivateKey.generate(), "")
        barrier.wait()
        try:
            got.append(server.enrol(Enrolment(claim=claim, request=request)))
        except TrustError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=run, args=((fleet.identity, second)[number % 2],)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert len(got) == 1
    assert refused == ["claim.refused"] * (count - 1)


def test_secret_is_kept_as_its_hash_alone(fleet):
    claim = fleet.claim()
    secret = claim.partition(".")[2]
    with fleet.store.read() as connection:
        row = connection.execute(select(claims)).one()
    assert secret not in str(row)
    assert len(bytes(row.secret_hash)) == 32
    assert all(secret not in str(entry) for entry in Audit(fleet.store).page().entries)


def test_claim_and_enrolment_are_in_the_audit_log(fleet):
    claim = fleet.claim(actor="on-call")
    ask(fleet, claim)
    enrolled, made = Audit(fleet.store).page(subject="device:lab/cam-7").entries
    assert (made.actor, made.action) == ("on-call", "claim.made")
    assert (enrolled.actor, enrolled.action) == ("device:lab/cam-7", "identity.enrolled")
    assert enrolled.fields["claim"] == claim.partition(".")[0]


def test_second_enrolment_ends_the_first_certificate(fleet):
    first, second = ask(fleet, fleet.claim()), ask(fleet, fleet.claim())
    listed = x509.load_pem_x509_crl(fleet.identity.crl().split(b"-----END X509 CRL-----")[0] + b"-----END X509 CRL-----\n")
    serials = {each.serial_number for each in listed}
    assert serials == {x509.load_pem_x509_certificate(first.certificate.encode()).serial_number}
    assert x509.load_pem_x509_certificate(second.certificate.encode()).serial_number not in serials


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"site": "Lab"}, "telemetry.name"),
        ({"device": "cam/7"}, "telemetry.name"),
        ({"site": "s" * 40, "device": "d" * 40}, "identity.name"),
        ({"seconds": 1.0}, "claim.time"),
        ({"seconds": 1e9}, "claim.time"),
        ({"labels": {"": "x"}}, "claim.labels"),
        ({"labels": {str(i): "x" for i in range(33)}}, "claim.labels"),
    ],
)
def test_impossible_claim_is_refused(fleet, given, code):
    with pytest.raises(UsageError) as caught:
        fleet.claim(**given)
    assert caught.value.code == code


def test_request_that_is_none_is_refused_before_the_claim_is_used(fleet):
    claim = fleet.claim()
    good = make_request(PrivateKey.generate(), "")
    name = x509.Name([])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    keys = (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048))
    others = [builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode() for key in keys]
    body = good.splitlines()
    forged = "\n".join([*body[:-2], body[-2][:-8] + "AAAAAAA=", body[-1]])
    for bad in ("", "x", forged, *others):
        with pytest.raises(EdgekitError) as caught:
            fleet.identity.enrol(Enrolment(claim=claim, request=bad))
        assert caught.value.code == "identity.request"
    assert ask(fleet, claim).device == "cam-7"


def test_list_of_claims_says_what_became_of_each(fleet):
    used, late, gone = fleet.claim("lab", "a"), fleet.claim("lab", "b", seconds=60), fleet.claim("lab", "c")
    fleet.claim("lab", "d")
    ask(fleet, used)
    fleet.identity.withdraw_claim(gone.partition(".")[0], actor="operator")
    fleet.clock.forward(minutes=5)
    assert late
    assert {view.device: view.state for view in fleet.identity.claims()} == {
        "a": "used",
        "b": "expired",
        "c": "withdrawn",
        "d": "open",
    }
    assert fleet.identity.claims()[0].device == "d"


def test_claim_that_was_used_answers_no_later_key_of_the_device(fleet):
    claim, first, second = fleet.claim(), PrivateKey.generate(), PrivateKey.generate()
    issued = ask(fleet, claim, first)
    fleet.identity.renew(make_renewal(issued.certificate, first, second))
    with pytest.raises(TrustError):
        ask(fleet, claim, second)
