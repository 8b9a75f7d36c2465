"""Named points at which the tests let a process die or hang: ``EDGEKIT_FAULT=kill:stage``.

Without the variable nothing happens. Actions are ``kill`` and ``segv`` (the signals) and ``hang`` (for ever).
"""

from __future__ import annotations

import os
import signal
from typing import Final

FAULT_VARIABLE: Final = "EDGEKIT_FAULT"


def checkpoint(name: str) -> None:
    """Die here, as in a power cut, if the variable says so."""
    if (wanted := os.environ.get(FAULT_VARIABLE)) is None:
        return
    action, _, where = wanted.partition(":")
    if where != name:
        return
    if action == "hang":
        while True:
            signal.pause()
    os.kill(os.getpid(), signal.SIGSEGV if action == "segv" else signal.SIGKILL)


def is_faulty() -> bool:
    """Whether any fault is asked for: names that cost something to make need not be made otherwise."""
    return FAULT_VARIABLE in os.environ
