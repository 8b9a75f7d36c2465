"""Sign remote commands: what an operator does. Needs ``cryptography``; a device and the fleet server never load this.

>>> sign_command(new_command("cam-7", "probe", life_s=300, now=now), [signer])  # doctest: +SKIP
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.command import COMMAND_MEDIA_TYPE, BenchmarkOrder, Command, CommandKind, PauseOrder, RollbackOrder
from edgekit.trust.command import MAX_COMMAND_BYTES, parse_command
from edgekit.trust.signer import Signer, sign_envelope


def new_command(
    device: str,
    kind: CommandKind,
    *,
    now: datetime,
    life_s: float,
    benchmark: BenchmarkOrder | None = None,
    pause: PauseOrder | None = None,
    rollback: RollbackOrder | None = None,
) -> Command:
    """A command with a new id, valid from now for some seconds."""
    issued_at = now.replace(microsecond=0)
    return Command(
        device=device,
        id=secrets.token_hex(16),
        issued_at=issued_at,
        expires_at=issued_at + timedelta(seconds=life_s),
        kind=kind,
        benchmark=benchmark,
        pause=pause,
        rollback=rollback,
    )


def sign_command(command: Command, signers: Sequence[Signer]) -> bytes:
    """The DSSE envelope of a command, with one signature per key. What a device would refuse to read is not signed.

    Raises:
        UsageError: ``command.unsigned`` without a key, ``command.malformed``, ``command.too_large``.
    """
    if not signers:
        raise UsageError("command.unsigned", f"{command.device}: no key to sign the command with.", hint="Give --key KEY.")
    payload = encode_json(command)
    try:
        parse_command(payload)
    except ArtifactError as error:
        raise UsageError(error.code, f"{command.device}: not signed: {error.message}") from error
    data = sign_envelope(payload, signers, payload_type=COMMAND_MEDIA_TYPE)
    if len(data) > MAX_COMMAND_BYTES:
        raise UsageError(
            "command.too_large", f"{command.device}: the command has {len(data)} bytes, a device reads {MAX_COMMAND_BYTES}."
        )
    return data
