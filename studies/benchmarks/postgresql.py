"""A PostgreSQL server of one's own, on a free port, for as long as it is needed."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy

USER = "spansearch"


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: of a database of it that is always there.
        restart: ends it as a crash would, and starts it again after some seconds.
    """

    url: str
    restart: Callable[[float], None]


class NoServerError(Exception):
    """There can be none: what it needs is not installed."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _program(name: str) -> str:
    beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(beside[-1]) if beside else shutil.which(name)
    if found is None:
        raise NoServerError(f"PostgreSQL's {name} is not installed (apt-get install postgresql)")
    return found


@contextlib.contextmanager
def postgresql() -> Iterator[Server]:
    """A server without databases of its own, which is gone afterwards."""
    initdb, control = _program("initdb"), _program("pg_ctl")
    if not find_spec("psycopg"):
        raise NoServerError("psycopg is not installed: pip install 'spansearch[postgres]'")
    with tempfile.TemporaryDirectory(prefix="spansearch-postgresql-") as folder:
        data, port = Path(folder) / "data", free_port()
        as_user = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            owner = pwd.getpwnam("postgres" if _exists("postgres") else "nobody")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

        def run(*command: str) -> None:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, **as_user)
            assert done.returncode == 0, done.stdout + done.stderr

        run(initdb, "-D", str(data), "-U", USER, "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off -c max_connections=200"

        def start() -> None:
            run(control, "-D", str(data), "-o", options, "-w", "-l", f"{folder}/log", "start")

        def stop() -> None:
            run(control, "-D", str(data), "-m", "immediate", "-w", "stop")

        def restart(seconds: float) -> None:
            stop()
            time.sleep(seconds)
            start()

        start()
        try:
            yield Server(f"postgresql://{USER}:secret@127.0.0.1:{port}/postgres", restart)
        finally:
            stop()


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def database(server: Server) -> str:
    """The URL of a new, empty database of a server."""
    name = f"d{uuid.uuid4().hex[:12]}"
    driven = server.url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(driven, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.url.rsplit("/", 1)[0] + f"/{name}"
