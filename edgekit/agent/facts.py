"""What this device is. Run as ``python -m edgekit.agent.facts``: it prints one JSON record and ends.

The probe loads numpy and looks at the runtimes; in a child process of its own it costs the supervisor no memory, and a runtime
that crashes on import costs nothing but an answer.
"""

from __future__ import annotations

import platform
import subprocess
import sys

from edgekit.agent.interpreter import module_command
from edgekit.agent.plan import DeviceFacts
from edgekit.errors import EnvironmentFault
from edgekit.schema.base import decode_json, encode_json

PROBE_SECONDS = 60.0


def probe_facts() -> DeviceFacts:
    """Look at this machine, in this process."""
    from edgekit.runtime.registry import installed_runtimes  # noqa: PLC0415 - numpy: only in the child
    from edgekit.target.probe import probe_target  # noqa: PLC0415 - the same

    profile = probe_target()
    return DeviceFacts(
        arch=profile.arch,
        cpu=profile.cpu,
        isa=profile.isa,
        cores=profile.cores,
        ram_mb=profile.ram_mb,
        os=f"{platform.system()} {platform.release()}",
        runtimes={str(name): version for name, version in installed_runtimes().items()},
    )


def ask_facts() -> DeviceFacts:
    """Look at this machine, in a child process.

    Raises:
        EnvironmentFault: ``agent.probe_failed``.
    """
    try:
        command = module_command("edgekit.agent.facts")
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=True)  # noqa: S603 - our own module
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or b""
        last = detail.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise EnvironmentFault(
            "agent.probe_failed", f"this machine could not be probed: {last[0]}", hint='Run "edgekit doctor --for agent".'
        ) from error
    return decode_json(done.stdout, DeviceFacts, name="device facts")


if __name__ == "__main__":
    sys.stdout.buffer.write(encode_json(probe_facts()))
