"""The desired state as a device accepts it: bytes in, verdict out, the time is an argument.

The checks, in order; the first that fails refuses the envelope:

1. It is not longer than ``MAX_DESIRED_BYTES``.
2. It is a DSSE envelope of the desired state's type, signed by enough different trusted keys.
3. Its payload is canonical JSON of a desired state that holds together: every time has a zone, every number is in its range.
4. It is for this device.
5. Its ``seq`` is higher than the last one that this device acted on.
6. It was issued before it expires, not further ahead than ``MAX_AHEAD``, and has not expired.

A desired state brings no release: :func:`select_release` finds the one it names among those that signed metadata lists. Signing
is in :mod:`edgekit.trust.desired_signer`, which a device never loads.

    >>> state = verify_desired(data, keys, device="cam-7", last_seq=41, now=now)  # doctest: +SKIP
    >>> select_release(state, releases, "kws").info.version                       # doctest: +SKIP
    '2.0.0'
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from edgekit.errors import ArtifactError, TrustError
from edgekit.schema.base import decode_json, is_canonical_json
from edgekit.schema.desired import DESIRED_MEDIA_TYPE, DesiredState
from edgekit.schema.digest import short
from edgekit.schema.release import Release
from edgekit.trust.dsse import verify_envelope
from edgekit.trust.keys import PublicKey

MAX_DESIRED_BYTES = 64 * 1024
"""Of the envelope: it travels as one retained message."""
MAX_AHEAD = timedelta(days=1)
"""How far ``issued_at`` may lie ahead of the device's clock: further, one of the two clocks cannot judge an expiry."""
_ASK = "Let the fleet server issue it again."


def verify_desired(
    data: bytes, keys: Iterable[PublicKey], *, device: str, last_seq: int, now: datetime, threshold: int = 1
) -> DesiredState:
    """Verify a signed desired state.

    Args:
        data: the DSSE envelope.
        keys: the trusted keys of the fleet server; the same key material counts once.
        device: this device's name.
        last_seq: of the desired state that this device acted on last; 0 for none.
        now: the device's time, aware, never earlier than its time floor.
        threshold: how many different keys must have signed, at least 1.

    Returns:
        What this device shall run.

    Raises:
        ArtifactError: ``desired.too_large``, ``envelope.malformed``, ``desired.malformed``.
        TrustError: ``trust.payload_type``, ``trust.signature``, ``desired.other_device``, ``desired.replayed``,
            ``desired.from_future``, ``desired.expired``.
        ValueError: when ``now`` has no time zone or the threshold is below 1, which is the caller's mistake.
    """
    if now.utcoffset() is None:
        raise ValueError("now must be an aware datetime")
    if len(data) > MAX_DESIRED_BYTES:
        raise ArtifactError(
            "desired.too_large", f"the desired state has {len(data)} bytes, at most {MAX_DESIRED_BYTES} are read.", hint=_ASK
        )
    state = parse_desired(verify_envelope(data, keys, payload_type=DESIRED_MEDIA_TYPE, threshold=threshold))
    if state.device != device:
        raise TrustError(
            "desired.other_device",
            f"the desired state is for {state.device[:64]!r}, this device is {device!r}.",
            hint="Somebody delivers another device's; check who may write this device's topic.",
        )
    if state.seq <= last_seq:
        raise TrustError(
            "desired.replayed",
            f"the desired state has seq {state.seq}, this device has acted on {last_seq}.",
            hint="An old one was delivered again; if the fleet server was restored from a backup, raise its seq.",
        )
    _check_time(state, now)
    return state


def parse_desired(payload: bytes) -> DesiredState:
    """Check 3: read what the envelope holds.

    Raises:
        ArtifactError: ``desired.malformed``.
    """
    if not is_canonical_json(payload):
        raise ArtifactError("desired.malformed", "the desired state is not canonical JSON.", hint=_ASK)
    try:
        state = decode_json(payload, DesiredState, name="the desired state")
    except ArtifactError as error:
        raise ArtifactError("desired.malformed", error.message, hint=_ASK) from error
    if state.expires_at <= state.issued_at:
        raise ArtifactError("desired.malformed", "the desired state expires before it is issued.", hint=_ASK)
    return state


def _check_time(state: DesiredState, now: datetime) -> None:
    """Check 6."""
    if state.issued_at - now > MAX_AHEAD:
        raise TrustError(
            "desired.from_future",
            f"the desired state was issued at {state.issued_at.isoformat()}, this device's clock says {now.isoformat()}.",
            hint="Check this device's clock, then the fleet server's.",
        )
    if now >= state.expires_at:
        raise TrustError(
            "desired.expired",
            f"the desired state expired at {state.expires_at.isoformat()}, it is {now.isoformat()}.",
            hint="Somebody holds back a newer one, or the fleet server stopped issuing; check this device's clock, too.",
        )


def select_release(desired: DesiredState, releases: Iterable[Release], model: str) -> Release:
    """The release that the desired state names for a model.

    Args:
        desired: a verified desired state.
        releases: what signed metadata lists.
        model: the model's name.

    Raises:
        TrustError: ``desired.no_model`` when it says nothing of this model, ``desired.unknown_release`` when signed metadata
            lists no release of this model with that counter and that manifest.
    """
    wanted = desired.models.get(model)
    if wanted is None:
        raise TrustError("desired.no_model", f"the desired state of {desired.device} says nothing of the model {model!r}.")
    for release in releases:
        if (release.info.name, release.info.counter, release.manifest_digest) == (model, wanted.counter, wanted.manifest):
            return release
    raise TrustError(
        "desired.unknown_release",
        f"{model}: signed metadata lists no release {wanted.counter} with the manifest sha256:{short(wanted.manifest)}….",
        hint="Publish the release first; a desired state only chooses among what is published.",
    )
