"""Keeps the certificate fresh: asks for the next one at two thirds of its life, and tells the fleet how that went.

Each device asks at a moment of its own within a tenth of that life, so that a fleet that was enrolled on one day does not
come back on one day. Whoever cannot renew goes on with what it has, and tries again: at first within minutes, then every
few hours; a device that was revoked asks once a day, since somebody may have made up their mind.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit.agent.background import in_background
from edgekit.agent.certificates import CertificateFacts
from edgekit.agent.enrolment import renew
from edgekit.agent.identity import IdentityFiles
from edgekit.agent.plan import backoff_s
from edgekit.errors import DeviceError, EdgekitError, TrustError
from edgekit.schema.identity import DeviceIdentity

if TYPE_CHECKING:
    from edgekit.agent.journal import Journal

logger = logging.getLogger(__name__)

SHARE, SPREAD = 2 / 3, 0.1
LOOK_S = 600.0
"""The clock is looked at so often: it may be set in between."""
RETRY_BASE_S, RETRY_CAP_S, REFUSED_S = 60.0, 4 * 3600.0, 86400.0


def due_at(certificate: CertificateFacts) -> datetime:
    """When the next certificate is asked for.

    >>> from datetime import UTC, datetime
    >>> begin, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 31, tzinfo=UTC)
    >>> facts = CertificateFacts(common_name="", not_before=begin, not_after=end, key_info=b"", fingerprint="sha256:0", raw=b"")
    >>> 20 <= (due_at(facts) - begin).days < 23
    True
    """
    life = certificate.not_after - certificate.not_before
    place = int.from_bytes(hashlib.sha256(certificate.fingerprint.encode()).digest()[:4], "big") / 2**32
    return certificate.not_before + life * (SHARE + SPREAD * place)


@dataclass
class Renewer:
    """Renews in the background of the agent's loop.

    Args:
        files: the identity.
        about: who this is.
        journal: hears what happens.
        on_renewed: called with each new certificate.
        now: the clock.
    """

    files: IdentityFiles
    about: DeviceIdentity
    journal: Journal
    on_renewed: Callable[[], None] = lambda: None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _failures: int = 0
    _told: str = ""

    async def run(self) -> None:
        """Until the agent ends."""
        while True:
            wait = await self.look()
            await asyncio.sleep(wait)

    async def look(self) -> float:
        """Renew when it is time; seconds until the next look."""
        try:
            present = self.files.certificate()
            wait = (due_at(present) - self.now()).total_seconds()
            if wait > 0:
                return min(LOOK_S, wait)
            fresh = await in_background(lambda: renew(self.files, self.about), name="renewal")
        except (EdgekitError, OSError) as error:
            return self._note_failure(error)
        self._failures, self._told = 0, ""
        detail = f"the certificate of {fresh.common_name} holds until {fresh.not_after:%Y-%m-%d %H:%M} UTC"
        self.journal.event("certificate_renewed", detail)
        self.on_renewed()
        return LOOK_S

    def _note_failure(self, error: EdgekitError | OSError) -> float:
        self._failures += 1
        known = error if isinstance(error, EdgekitError) else DeviceError("device.storage", f"{self.files.folder}: {error}.")
        if known.code != self._told or self._failures % 10 == 0:
            self._told = known.code
            self.journal.event("certificate_not_renewed", error=known)
        if isinstance(known, TrustError) and known.code.startswith("identity."):
            return REFUSED_S
        return max(RETRY_BASE_S, backoff_s(self._failures, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S, draw=random.random))
