"""Sign desired states: what the fleet's director does. Needs ``cryptography``; a device never loads this.

It refuses to sign what a device would refuse to read.

    >>> sign_desired(state, [signer])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.desired import DESIRED_MEDIA_TYPE, DesiredState
from edgekit.trust.desired import MAX_DESIRED_BYTES, parse_desired
from edgekit.trust.signer import Signer, sign_envelope


def sign_desired(state: DesiredState, signers: Sequence[Signer]) -> bytes:
    """The DSSE envelope of a desired state, with one signature per key.

    Raises:
        UsageError: ``desired.unsigned`` without a key, ``desired.malformed``, ``desired.too_large``.
    """
    if not signers:
        raise UsageError("desired.unsigned", f"{state.device}: no key to sign the desired state with.")
    payload = encode_json(state)
    try:
        parse_desired(payload)
    except ArtifactError as error:
        raise UsageError(error.code, f"{state.device}: not signed: {error.message}") from error
    data = sign_envelope(payload, signers, payload_type=DESIRED_MEDIA_TYPE)
    if len(data) > MAX_DESIRED_BYTES:
        raise UsageError(
            "desired.too_large",
            f"{state.device}: the signed desired state has {len(data)} bytes, a device reads {MAX_DESIRED_BYTES}.",
            hint="Name fewer models.",
        )
    return data
