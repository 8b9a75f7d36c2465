"""The worker's entry: ``python -m edgekit.agent.worker_process``, without OpenSSL, which it does not need.

asyncio and hashlib load it where they find it: 5 MB of memory in each worker (measured), for a server that speaks plain HTTP on
loopback. Both go on without it: hashing a model takes the interpreter's own SHA-256 then.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def leave_out_openssl() -> None:
    """Let the import system say that these modules are not there."""
    sys.modules["ssl"] = None  # type: ignore[assignment]
    if find_spec("_sha256") or find_spec("_sha2"):  # the second since Python 3.12
        sys.modules["_hashlib"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    leave_out_openssl()
    from edgekit.agent.worker import main

    sys.exit(main())
