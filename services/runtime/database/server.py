"""A PostgreSQL server as a service reaches it: every connection is made here.

    postgresql://task@db.internal/task?password_file=/run/secrets/task

names a database in libpq's words, and one of ours: a file that its owner alone can read, which holds the password, read
anew for each connection.
What the URL says of `sslmode`, `sslrootcert` and the like holds for every connection.
Source: https://www.postgresql.org/docs/current/libpq-connect.html
"""

import contextlib
import os
import re
import socket
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict

from services.runtime.database.transaction import DatabaseRefused, DatabaseUnavailable
from services.runtime.secrets import require_private

CONNECT_SECONDS = 10
_PASSWORD_FILE = "password_file"  # noqa: S105 - a name
_WATCHFUL: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
    "fallback_application_name": "branchline",
}
"""A machine that is gone without a word is given up in 25 seconds, in the middle of a statement too."""

_FOR_GOOD = re.compile(
    r"authentication failed|does not exist|permission denied|no password supplied|no pg_hba\.conf entry"
    r"|not permitted to log in|server does not support SSL|certificate verify failed"
)
"""What a server, or libpq for it, answers that will not mend itself; error codes do not reach the client so early."""


@cache
def _split(url: str) -> tuple[str, Path | None]:
    """Return a URL as libpq takes it, and where its password is."""
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    files = [Path(value) for name, value in given if name == _PASSWORD_FILE]
    query = urlencode([(name, value) for name, value in given if name != _PASSWORD_FILE], quote_via=quote)
    plain = urlunsplit(parts._replace(query=query))
    try:
        conninfo_to_dict(plain)
    except psycopg.Error:  # it quotes what it does not understand, which may be the password
        raise DatabaseRefused('a database on a server is "postgresql://ROLE@HOST/DATABASE"; this URL is none') from None
    return plain, files[-1] if files else None


def named(url: str) -> dict[str, str]:
    """Return what a URL says, in libpq's names, with its password. Raise DatabaseRefused if it is none."""
    plain, file = _split(url)
    given = {name: str(value) for name, value in conninfo_to_dict(plain).items()}
    given.setdefault("dbname", given.get("user", ""))
    return given if file is None else {**given, "password": _read(file)}


def open_connection(url: str, *, autocommit: bool = False) -> psycopg.Connection[Any]:
    """Connect, for those who know psycopg's errors, such as SQLAlchemy."""
    plain, file = _split(url)
    password: dict[str, Any] = {} if file is None else {"password": _read(file)}
    return psycopg.connect(plain, autocommit=autocommit, connect_timeout=CONNECT_SECONDS, **_WATCHFUL, **password)


def connect(url: str, *, autocommit: bool = True) -> psycopg.Connection[Any]:
    """Connect; unless told otherwise every statement is a transaction by itself.

    Raise DatabaseRefused if the server will never have us so, DatabaseUnavailable if it cannot be reached now.
    """
    try:
        return open_connection(url, autocommit=autocommit)
    except psycopg.OperationalError as error:
        kind = DatabaseRefused if _FOR_GOOD.search(str(error)) else DatabaseUnavailable
        raise kind(" ".join(str(error).split())) from error


def hang_up(connection: psycopg.Connection[Any]) -> None:
    """Break a connection whose user waits for an answer; from any thread. The user hears of it."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)


@contextmanager
def answered_within(connection: psycopg.Connection[Any], seconds: float) -> Generator[None, None, None]:
    """Hang up if the block takes longer: a server that is stopped answers nothing, no timeout of its own either."""
    timer = Timer(seconds, hang_up, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(file: Path) -> str:
    try:
        require_private(file)
        return file.read_text().strip()
    except (OSError, ValueError) as error:
        raise DatabaseRefused(f"its password is not to be read: {error}") from error
