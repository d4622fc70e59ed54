"""A Postgres server of the tests' own, where Postgres is installed."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

PG_CTL = shutil.which("pg_ctl")


class Postgres:
    """A server with an empty database, on a port of this machine alone.

    Attributes:
        url: of the database, with its password.
        password: likewise.
    """

    def __init__(self):
        self._folder, self.password = (
            Path(tempfile.mkdtemp(prefix="deltaguard-postgres-")),
            "pass-hidden-word",
        )
        # Postgres refuses to run as root.
        self._user = _other_user() if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        secret = self._folder / "secret"
        secret.write_text(self.password)
        secret.chmod(0o644)
        self._run(
            "initdb", "-A", "scram-sha-256", "-U", "deltaguard", "--pwfile", secret, "-E", "UTF8", "--no-sync"
        )
        self._options = f"-p {port} -h 127.0.0.1 -k '' -F"
        self.url = f"postgresql://deltaguard:{self.password}@127.0.0.1:{port}/postgres"

    def start(self):
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "-w", "-l", self._folder / "log", "-o", self._options, "start")

    def stop(self):
        """End it as a crash would."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def remove(self):
        """End it, and remove what it kept."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _run(self, name, *arguments):
        program = Path(PG_CTL).with_name(name)
        command = [program, "-D", self._folder / "data", *arguments]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        # What a server inherits of pipes it keeps open.
        done = subprocess.run(
            list(map(str, command)),
            user=self._user,
            cwd=self._folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, (
            name,
            (self._folder / "log").exists() and (self._folder / "log").read_text(),
        )


def _other_user():
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)
