"""A real PostgreSQL of a test's own: made by initdb in a temporary folder, on a loopback port, ended with the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg
from fleet_world import free_port

SYSTEM_USER = "postgres"
START_SECONDS = 30


def find_binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``; None when PostgreSQL's server is not installed."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@dataclass
class PostgresServer:
    """A running server; ``options`` are settings like ``fsync=off``."""

    options: tuple[str, ...] = ()

    def start(self) -> PostgresServer:
        binaries = find_binaries()
        assert binaries is not None
        self.folder = Path(tempfile.mkdtemp(prefix="edgekit-postgres-"))
        # PostgreSQL refuses to run as root: then the system's own user owns the folder and runs it
        account = pwd.getpwnam(SYSTEM_USER) if os.geteuid() == 0 else None
        as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        if account:
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        data, self.port = self.folder / "data", free_port()
        command = [str(binaries / "initdb"), "-D", str(data), "-U", "edgekit", "-A", "trust", "-E", "UTF8", "--no-sync"]
        made = subprocess.run([*command, "--locale=C"], cwd=self.folder, capture_output=True, text=True, check=False, **as_user)
        assert made.returncode == 0, made.stderr
        settings = (f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self.folder}", *self.options)
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [str(binaries / "postgres"), "-D", str(data), *(part for item in settings for part in ("-c", item))],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                **as_user,
            )
        self._wait()
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                log = (self.folder / "log").read_text()
                assert time.monotonic() < deadline, log
                assert self.process.poll() is None, log
                time.sleep(0.05)
            else:
                return

    def url(self, database: str) -> str:
        return f"postgresql://edgekit@127.0.0.1:{self.port}/{database}"

    def run(self, statement: str) -> None:
        """One statement outside of a transaction, in the maintenance database."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
