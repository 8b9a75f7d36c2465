"""The agent's own process: ``edgekit agent run`` becomes this one, which is free of the command line's libraries.

On a device 11 MB of memory for the parsing of some flags, kept for years, are too much. The settings come as JSON over an
inherited descriptor.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from edgekit.agent.config import AgentConfig
from edgekit.agent.interpreter import module_command
from edgekit.agent.spare import keep, start_spare
from edgekit.cli.console import note, paint
from edgekit.errors import EdgekitError
from edgekit.schema.base import decode_json, encode_json

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "4096"}
"""What threads and a download took for a moment goes back to the system: 1.5 MB, for years."""


def become_agent(config: AgentConfig) -> NoReturn:
    """Replace this process by the agent's, under the same process id."""
    descriptor = os.memfd_create("edgekit-agent-config", 0)
    os.write(descriptor, encode_json(config))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.set_inheritable(descriptor, True)
    sys.stdout.flush()
    sys.stderr.flush()
    spare = start_spare(config.state_path) or ()
    command = module_command("edgekit.cli.agent_process", str(descriptor), *map(str, spare))
    os.execve(sys.executable, command, ENVIRONMENT | dict(os.environ))  # noqa: S606 - our own interpreter and module


def main(arguments: list[str]) -> int:
    """Run the agent; the exit code."""
    if len(arguments) > 1:
        keep(int(arguments[1]), int(arguments[2]))
    from edgekit.agent.daemon import run_agent

    for name, value in ENVIRONMENT.items():
        if os.environ.get(name) == value:
            del os.environ[name]  # ours alone: it would make a worker slower
    with os.fdopen(int(arguments[0]), "rb") as file:
        config = decode_json(file.read(), AgentConfig, name="agent settings")
    try:
        return run_agent(config)
    except EdgekitError as error:
        note(f"{paint('error:', 'red', 'bold', stream=sys.stderr)} {error.message}")
        if error.hint:
            note(f"{paint('hint:', 'cyan', stream=sys.stderr)} {error.hint}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
