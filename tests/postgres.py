"""A real PostgreSQL server in a temporary folder, on a free port of this machine, for the tests that need one.

It is Debian's (``apt-get install postgresql``), found on the PATH or where Debian puts it; a test is skipped, with the
reason, where there is none. As the server refuses to run as root, root runs it as the user ``nobody``.
"""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def programs() -> Path:
    """The folder of initdb and postgres; skips the test where there is none, or no driver."""
    pytest.importorskip("psycopg", reason="psycopg, the driver of PostgreSQL, is not installed: pip install -e '.[dev]'")
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders or not (folders[-1] / "initdb").exists():
        pytest.skip("no PostgreSQL here: no initdb on the PATH or in /usr/lib/postgresql; apt-get install postgresql")
    return folders[-1]


class Server:
    """``with Server() as server``, then ``server.database("name")``."""

    def __init__(self) -> None:
        self.bin = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        self.user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self.user:
            os.chown(self.folder, self.user.pw_uid, self.user.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://tester@127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        try:
            self._run("initdb", "--pgdata", "data", "--username", "tester", "--auth", "trust", "--no-sync", "--encoding",
                      "UTF8", "--no-locale")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def database(self, name: str) -> str:
        """The URL of a new, empty database."""
        import psycopg

        with psycopg.connect(f"{self.url}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"{self.url}/{name}"

    def start(self) -> None:
        settings = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "--pgdata", "data", "--log", "log", "--wait", "--options", settings, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "--pgdata", "data", "--wait", "--mode", "immediate", "stop")

    def __exit__(self, *fault) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        who = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []} if self.user else {}
        done = subprocess.run(
            [self.bin / program, *arguments], cwd=self.folder, env={"PATH": str(self.bin), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120, **who,
        )
        if done.returncode:
            log = self.folder / "log"
            raise AssertionError(f"{program}: {done.stderr.decode()}{log.read_text() if log.exists() else ''}")
