"""A remote command as a device accepts it: bytes in, verdict out, the time is an argument.

The checks, in order; the first that fails refuses the envelope:

1. It is not longer than ``MAX_COMMAND_BYTES``.
2. It is a DSSE envelope of the command's type, signed by enough different trusted keys.
3. Its payload is canonical JSON of a command that holds together.
4. It is for this device.
5. It lives no longer than ``MAX_LIFE``, was not issued further ahead than ``MAX_AHEAD``, and has not expired.

Whether it was taken before, and whether this device obeys such commands, is the agent's to say. Signing is in
:mod:`edgekit.trust.command_signer`, which a device never loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from edgekit.errors import ArtifactError, TrustError
from edgekit.schema.base import decode_json, is_canonical_json
from edgekit.schema.command import COMMAND_MEDIA_TYPE, Command
from edgekit.trust.dsse import decode_envelope, valid_keys
from edgekit.trust.keys import PublicKey

MAX_COMMAND_BYTES = 16 * 1024
MAX_LIFE = timedelta(days=1)
"""From issue to expiry: so long a device must remember what it did."""
MAX_AHEAD = timedelta(minutes=10)
_ASK = 'Issue it again: "edgekit fleet command".'


@dataclass(frozen=True, kw_only=True)
class VerifiedCommand:
    """A command and who signed it."""

    command: Command
    keyids: tuple[str, ...]


def verify_command(
    data: bytes, keys: Iterable[PublicKey], *, device: str, now: datetime, threshold: int = 1
) -> VerifiedCommand:
    """Verify a signed command.

    Args:
        data: the DSSE envelope.
        keys: the keys that may command; the same key material counts once.
        device: this device's name.
        now: the device's time, aware, never earlier than its time floor.
        threshold: how many different keys must have signed, at least 1.

    Raises:
        ArtifactError: ``command.too_large``, ``envelope.malformed``, ``command.malformed``.
        TrustError: ``trust.payload_type``, ``trust.signature``, ``command.other_device``, ``command.from_future``,
            ``command.expired``.
        ValueError: when ``now`` has no time zone or the threshold is below 1, which is the caller's mistake.
    """
    if now.utcoffset() is None:
        raise ValueError("now must be an aware datetime")
    if threshold < 1:
        raise ValueError("threshold must be at least 1")
    if len(data) > MAX_COMMAND_BYTES:
        raise ArtifactError("command.too_large", f"the command has {len(data)} bytes, at most {MAX_COMMAND_BYTES} are read.")
    envelope = decode_envelope(data, name="the command")
    if envelope.payload_type != COMMAND_MEDIA_TYPE:
        raise TrustError(
            "trust.payload_type", f"the envelope holds {envelope.payload_type[:80]}, expected {COMMAND_MEDIA_TYPE}."
        )
    signers = valid_keys(envelope, keys)
    if len(signers) < threshold:
        raise TrustError("trust.signature", f"{len(signers)} of {threshold} needed signatures by trusted keys are valid.")
    command = parse_command(envelope.payload)
    if command.device != device:
        raise TrustError(
            "command.other_device",
            f"the command is for {command.device[:64]!r}, this device is {device!r}.",
            hint="Somebody delivers another device's; check who may write this device's topic.",
        )
    _check_time(command, now)
    return VerifiedCommand(command=command, keyids=tuple(key.keyid for key in signers))


def parse_command(payload: bytes) -> Command:
    """Check 3: read what the envelope holds.

    Raises:
        ArtifactError: ``command.malformed``.
    """
    if not is_canonical_json(payload):
        raise ArtifactError("command.malformed", "the command is not canonical JSON.", hint=_ASK)
    try:
        command = decode_json(payload, Command, name="the command")
    except ArtifactError as error:
        raise ArtifactError("command.malformed", error.message, hint=_ASK) from error
    if command.expires_at <= command.issued_at:
        raise ArtifactError("command.malformed", "the command expires before it is issued.", hint=_ASK)
    if command.expires_at - command.issued_at > MAX_LIFE:
        raise ArtifactError("command.malformed", f"the command lives longer than {MAX_LIFE}.", hint=_ASK)
    return command


def _check_time(command: Command, now: datetime) -> None:
    if command.issued_at - now > MAX_AHEAD:
        raise TrustError(
            "command.from_future",
            f"the command was issued at {command.issued_at.isoformat()}, this device's clock says {now.isoformat()}.",
            hint="Check this device's clock, then that of who issued it.",
        )
    if now >= command.expires_at:
        raise TrustError(
            "command.expired",
            f"the command expired at {command.expires_at.isoformat()}, it is {now.isoformat()}.",
            hint="Issue it again, with a longer --expires-s for a device that is seldom connected; check its clock, too.",
        )
