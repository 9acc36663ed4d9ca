"""Makes the databases of an installation on a PostgreSQL server: a role and a database for each service.

Nobody but a service's role, and who administers the server, may open its database.
"""

import asyncio
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from rich.console import Console

from cli.installation import GATEWAY, SERVICES
from cli.server import configure
from cli.settings import SettingsError
from services.runtime.database import DatabaseRefused, DatabaseUnavailable
from services.runtime.database.server import connect, named

_OWNER = "SELECT rolname FROM pg_database JOIN pg_roles ON pg_roles.oid = datdba WHERE datname = %s"
_ROLE = "SELECT 1 FROM pg_roles WHERE rolname = %s"


async def make_databases(console: Console, admin_url: str, data_dir: Path) -> None:
    """Make what is not there, and say what was made."""
    settings = configure(data_dir)
    urls = {name: settings.databases.of(name).value for name in SERVICES if name != GATEWAY}
    wanted = {name: named(url) for name, url in urls.items() if url}
    if not wanted:
        raise SettingsError('no database is set: databases.task = "postgresql://task@HOST/task" and so on')
    places: dict[tuple[str, str, str], str] = {}
    for name, given in wanted.items():
        place = given.get("host", ""), given.get("port", ""), given["dbname"]
        if other := places.get(place):
            raise SettingsError(f"the services {other} and {name} were given one database; each needs its own")
        places[place] = name
    for name, given in wanted.items():
        console.print(f"{name}: {await asyncio.to_thread(_make, admin_url, name, given)}", markup=False)


def _make(admin_url: str, service: str, given: dict[str, str]) -> str:
    try:
        with connect(admin_url) as admin:
            return _make_one(admin, given)
    except DatabaseUnavailable as error:
        raise SettingsError(str(error)) from error
    except DatabaseRefused as error:
        raise SettingsError(f"PostgreSQL does not let the administrator in: {error}") from error
    except psycopg.Error as error:
        raise SettingsError(f"the database of {service} was not made: {error}") from error


def _make_one(admin: psycopg.Connection[Any], given: dict[str, str]) -> str:
    """Make a role and its database; return what was done, in words."""
    role, database, password = given.get("user"), given["dbname"], given.get("password")
    if not role:
        raise SettingsError("the URL of a database names its role: postgresql://ROLE@HOST/DATABASE")
    names = {"role": sql.Identifier(role), "database": sql.Identifier(database)}

    def do(statement: LiteralString, **more: sql.Composable) -> None:
        admin.execute(sql.SQL(statement).format(**names, **more))

    new_role = admin.execute(_ROLE, [role]).fetchone() is None
    if new_role:
        do("CREATE ROLE {role} LOGIN")
    if password:
        encrypted = admin.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
        do("ALTER ROLE {role} PASSWORD {encrypted}", encrypted=sql.Literal(encrypted.decode()))
    owner = admin.execute(_OWNER, [database]).fetchone()
    if owner is None:
        do("GRANT {role} TO CURRENT_USER")  # who is no superuser must be of a role to give it anything
        do("CREATE DATABASE {database} OWNER {role}")
    elif owner[0] != role:
        raise SettingsError(f"the database {database} is there, and belongs to {owner[0]}, not to {role}")
    do("REVOKE ALL ON DATABASE {database} FROM PUBLIC")
    made = [f"role {role}"] * new_role + [f"database {database}"] * (owner is None)
    return f"made {' and '.join(made)}" if made else "is there"
