"""Named points at which the tests let the agent die: ``EDGEKIT_FAULT=kill:stage``. Without the variable this does nothing."""

from __future__ import annotations

import os
import signal
from typing import Final

FAULT_VARIABLE: Final = "EDGEKIT_FAULT"


def checkpoint(name: str) -> None:
    """Die here, as in a power cut, if the variable says so."""
    if os.environ.get(FAULT_VARIABLE) == f"kill:{name}":
        os.kill(os.getpid(), signal.SIGKILL)
