"""The identity of this device as files of its state folder: who it is, its key with its certificate, whom it believes.

    STATE/identity/
      identity.json   site, device, the fleet's address: written once, at the enrolment
      device.pem      key and certificate in one file, 0600: replaced as a whole, so that they always fit each other
      ca.pem          by which the fleet's servers are known
      next.key        a key whose certificate was asked for and has not come yet

The key is made here and never leaves. A power cut at any moment leaves the old pair or the new one; an answer that was lost is
asked for again with the same key, and the server gives the same certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekit.agent.certificates import CertificateFacts, read_certificates
from edgekit.durable import PRIVATE_FILE, make_folder, write_durably
from edgekit.errors import ArtifactError, TrustError, UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.identity import DeviceIdentity, Issued, common_name
from edgekit.trust.p256 import PrivateKey, public_key_info

FOLDER, ABOUT, PAIR, AUTHORITIES, NEXT_KEY = "identity", "identity.json", "device.pem", "ca.pem", "next.key"


@dataclass(frozen=True)
class IdentityFiles:
    """The folder."""

    folder: Path

    @classmethod
    def of(cls, state_dir: Path) -> IdentityFiles:
        """Of an agent's state folder."""
        return cls(state_dir / FOLDER)

    @property
    def pair(self) -> Path:
        """Key and certificate."""
        return self.folder / PAIR

    @property
    def authorities(self) -> Path:
        """Whom it believes."""
        return self.folder / AUTHORITIES

    def read(self) -> DeviceIdentity | None:
        """Who this device is; None when it was not enrolled, or when who asks may not look there.

        Raises:
            ArtifactError: ``record.malformed``, ``certificate.malformed``.
            UsageError: ``identity.unfinished``, ``identity.unreadable``.
        """
        path = self.folder / ABOUT
        try:
            about = decode_json(path.read_bytes(), DeviceIdentity, name=str(path))
            held = self.certificate().common_name
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            raise UsageError("identity.unreadable", f"{path}: {error.strerror}.") from error
        if held != (expected := common_name(about.site, about.device)):
            text = f"{self.folder}: the certificate is for {held}, the rest for {expected}."
            raise UsageError("identity.unfinished", text, hint='Let "edgekit agent enroll" with the same claim finish it.')
        return about

    def certificate(self) -> CertificateFacts:
        """The present certificate.

        Raises:
            ArtifactError: ``certificate.malformed``.
            OSError: it cannot be read.
        """
        found = read_certificates(self.pair.read_bytes())
        if not found:
            raise ArtifactError("certificate.malformed", f"{self.pair}: no certificate in it.")
        return found[0]

    def key(self) -> PrivateKey:
        """The present key.

        Raises:
            ArtifactError: ``certificate.malformed``.
            OSError: it cannot be read.
        """
        return PrivateKey.from_pem(self.pair.read_bytes())

    def next_key(self) -> PrivateKey:
        """The key that a certificate is asked for: the one that was begun with, or a new one, which is on the disk before use.

        Raises:
            OSError: the disk refuses.
        """
        path = self.folder / NEXT_KEY
        try:
            return PrivateKey.from_pem(path.read_bytes())
        except (FileNotFoundError, ArtifactError):
            key = PrivateKey.generate()
        make_folder(self.folder, mode=0o700)
        write_durably(path, key.to_pem().encode(), mode=PRIVATE_FILE)
        return key

    def take(self, key: PrivateKey, issued: Issued, about: DeviceIdentity) -> CertificateFacts:
        """Let a new pair count from now on.

        Raises:
            TrustError: ``identity.mismatch`` when the certificate is not for this key or this device.
            ArtifactError: ``certificate.malformed``.
            OSError: the disk refuses; the old pair counts.
        """
        facts = check_issued(key, issued)
        if read_certificates(issued.authorities):
            write_durably(self.authorities, issued.authorities.encode(), mode=0o644)
        if self._about() != about:
            write_durably(self.folder / ABOUT, encode_json(about), mode=0o644)
        write_durably(self.pair, (key.to_pem() + issued.certificate).encode(), mode=PRIVATE_FILE)
        (self.folder / NEXT_KEY).unlink(missing_ok=True)
        return facts

    def _about(self) -> DeviceIdentity | None:
        try:
            return msgspec.json.decode((self.folder / ABOUT).read_bytes(), type=DeviceIdentity)
        except (OSError, msgspec.DecodeError):
            return None


def check_issued(key: PrivateKey, issued: Issued) -> CertificateFacts:
    """The certificate of an answer, if it is for this key and for the device that the answer names.

    Raises:
        TrustError: ``identity.mismatch``.
        ArtifactError: ``certificate.malformed``.
    """
    found = read_certificates(issued.certificate)
    if not found or found[0].key_info != public_key_info(key.public):
        raise TrustError("identity.mismatch", "the server answered with a certificate for another key.")
    expected = common_name(issued.site, issued.device)
    if found[0].common_name != expected:
        raise TrustError("identity.mismatch", f"the server's certificate is for {found[0].common_name}, not for {expected}.")
    return found[0]
