"""The worker's entry: ``python -m edgekit.agent.worker_process``, without OpenSSL, which it does not need.

asyncio and hashlib load it where they find it: 5 MB of memory in each worker (measured), for a server that speaks plain HTTP on
loopback. Both go on without it: hashing a model takes the interpreter's own SHA-256 then.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec


def leave_out_openssl() -> None:
    """Let the import system say that these modules are not there."""
    sys.modules["ssl"] = None  # type: ignore[assignment]
    if find_spec("_sha256") or find_spec("_sha2"):  # the second since Python 3.12
        sys.modules["_hashlib"] = None  # type: ignore[assignment]


def wait_as_spare(descriptor: int, module: str) -> list[str] | None:
    """Load what will be needed, then wait for the task."""
    import socket  # noqa: PLC0415 - after what is left out

    from edgekit.agent.spare import receive  # noqa: PLC0415 - the same

    wire = socket.socket(fileno=descriptor)
    import_module("edgekit.agent.worker")
    loaded = import_module(module)
    getattr(loaded, "load_onnxruntime", lambda: None)()
    with wire:
        return receive(wire)


if __name__ == "__main__":
    leave_out_openssl()
    arguments: list[str] | None = sys.argv[1:]
    if sys.argv[1:2] == ["--spare"]:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        arguments = wait_as_spare(int(sys.argv[2]), sys.argv[3])
    if arguments is None:
        sys.exit(0)
    from edgekit.agent.worker import main

    sys.exit(main(arguments))
