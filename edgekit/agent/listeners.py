"""The Unix socket that programs on the same device ask through: its owner's alone unless the configuration says otherwise."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from edgekit.errors import EnvironmentFault

BACKLOG = 128
MAX_PATH_BYTES = 107
"""What the kernel takes (``sun_path``)."""


def bind_unix(path: Path, *, mode: int = 0o600) -> socket.socket:
    """A listening Unix socket; one that a killed agent left is replaced, one that somebody answers on is not.

    Args:
        path: of the socket; its folder must be there.
        mode: permissions, from its first moment on.

    Raises:
        EnvironmentFault: ``socket.in_use`` or ``socket.unusable``.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        text = f"{path}: a socket's path has at most {MAX_PATH_BYTES} bytes."
        raise EnvironmentFault("socket.unusable", text, hint="Choose a shorter one, for example /run/edgekit/agent.sock.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)  # a default ACL of the folder counts in place of the umask
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        text = f"{path}: cannot listen there: {error.strerror or error}."
        raise EnvironmentFault("socket.unusable", text, hint="Check the folder and its owner.") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Remove a socket that nobody answers on; anything else stays."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise EnvironmentFault("socket.in_use", f"{path}: is there, and no socket.", hint="Choose another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise EnvironmentFault(
                "socket.in_use", f"{path}: {error.strerror or error}.", hint="Choose another path."
            ) from error
    raise EnvironmentFault("socket.in_use", f"{path}: something listens there already.", hint="Choose another path.")
