"""Peak memory of a model: a process of its own that loads the runtime and the model and runs it a few times.

The figure is the kernel's high-water mark of resident memory (``VmHWM``), Python and the runtime included: what a device that
serves the model with edgekit's agent needs beside the agent itself.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS = 120
RUNS = 3
_PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
model, feeds, threads, runs = sys.argv[1:]
session = open_session(Path(model), options=SessionOptions(threads=int(threads)))
with np.load(feeds, allow_pickle=False) as arrays:
    inputs = {name: arrays[name] for name in arrays.files}
for _ in range(int(runs)):
    session.run(inputs)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def measure_peak_mb(model: Path, feeds: Mapping[str, NDArray[Any]], *, threads: int) -> float | None:
    """Peak resident memory in MB (10^6 bytes), or None where it cannot be measured."""
    with tempfile.TemporaryDirectory(prefix="edgekit-memory-") as folder:
        path = Path(folder) / "feeds.npz"
        np.savez(path, **dict(feeds))  # type: ignore[arg-type]
        command = [sys.executable, "-c", _PROGRAM, str(model), str(path), str(threads), str(RUNS)]
        try:
            done = subprocess.run(  # noqa: S603  our own interpreter and program
                command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
            )
            return int(done.stdout.split()[-1]) * 1024 / 1e6
        except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
            logger.debug("no memory figure model=%s reason=%s", model.name, error)
            return None
