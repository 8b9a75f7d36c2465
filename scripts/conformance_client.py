"""The client that the TUF conformance suite drives: edgekit's own, with the suite's command line (CLIENT-CLI.md there)."""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from edgekit.durable import write_durably
from edgekit.errors import EdgekitError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.state import Floors
from edgekit.trust.targets import fetch_targets, refresh_top_roles
from edgekit.trust.transport import Transport

FLOORS = "floors"
PROVISIONED = "provisioned"
"""Without .json: the suite takes every .json file for metadata."""


def main() -> int:
    """Exit 0: done; 1: refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    options = parser.parse_args()
    folder: Path = options.metadata_dir
    if options.command == "init":
        shutil.copyfile(options.trusted_root, folder / PROVISIONED)
        shutil.copyfile(options.trusted_root, folder / "root.json")
        return 0
    path = folder / FLOORS
    floors = decode_json(path.read_bytes(), Floors) if path.exists() else Floors()
    transport = Transport()
    try:
        root = (folder / PROVISIONED).read_bytes()
        updater, raised = refresh_top_roles(
            folder, options.metadata_url, root=root, floors=floors, now=datetime.now(UTC), transport=transport
        )
        write_durably(path, encode_json(raised))
        if options.command == "download":
            where = options.target_dir
            fetch_targets(updater, options.target_name, targets_url=options.target_base_url, out=where, transport=transport)
    except EdgekitError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1
    finally:
        transport.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
