"""An installation on a PostgreSQL server: what it makes there, who may open it, and what it says of bad settings."""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.installation import GATEWAY, SERVICES
from services.sandbox.providers.ports import free_port
from tests.support.databases import Server, look_into, running_server, server, tamper_with
from tests.support.process import PROGRAM, branchline
from tests.support.stack import eventually

OWNERS = [name for name in SERVICES if name != GATEWAY]
KEY = "a key for tests, long enough for HS256"
PASSWORD = "s3cret-and-told-to-nobody"


@pytest.fixture(scope="module")
def guarded() -> Generator[Server, None, None]:
    """A server with passwords, on a port."""
    with running_server(port=free_port(), passwords=True) as made:
        yield made


def settings(folder: Path, databases: Mapping[str, str]) -> dict[str, str]:
    given = {f"BRANCHLINE_DATABASES__{name.upper()}": url for name, url in databases.items()}
    given |= {f"BRANCHLINE_ADDRESSES__{name.upper()}": f"unix:{folder}/{name}.sock" for name in SERVICES}
    return {**os.environ, **given, "BRANCHLINE_SIGNING_KEY": KEY, "BRANCHLINE_DATA_DIR": str(folder / "data")}


@asynccontextmanager
async def serving(folder: Path, service: str, environment: Mapping[str, str]) -> AsyncGenerator[Any, None]:
    """Run a service; yield the stub of its health check."""
    log = (folder / f"{service}.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM), "serve", service, env=environment, stdout=log, stderr=log
    )
    try:
        async with grpc.aio.insecure_channel(f"unix:{folder}/{service}.sock") as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def until_health(stub: Any, status: int) -> None:
    async def look() -> bool:
        try:
            return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == status
        except grpc.aio.AioRpcError:
            return False

    await eventually(look)


@pytest.fixture(scope="module")
def made(guarded: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the URLs of all databases, which `branchline databases` has made."""
    folder = tmp_path_factory.mktemp("made")
    file = folder / "password"
    file.touch(mode=0o600)
    file.write_text(f"{PASSWORD}\n")
    urls = {name: f"{guarded.address_of(f'of_{name}', f'{name}_role')}?password_file={file}" for name in OWNERS}
    environment = settings(folder, urls)
    code, said = asyncio.run(branchline(environment, "databases", "--admin-url", guarded.url))
    assert code == 0, said
    assert [line for line in said.splitlines() if "made role" in line] == said.splitlines()
    code, said = asyncio.run(branchline(environment, "databases", "--admin-url", guarded.url))
    assert (code, said.splitlines()) == (0, [f"{name}: is there" for name in OWNERS])
    return urls


def test_a_services_role_opens_its_own_database_and_no_other(guarded: Server, made: dict[str, str]) -> None:
    for role in OWNERS:
        for name in OWNERS:
            url = guarded.address_of(f"of_{name}", f"{role}_role", PASSWORD)
            if role == name:
                psycopg.connect(url).close()
                continue
            with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                psycopg.connect(url)


async def test_services_migrate_and_serve_with_no_more_than_their_roles(
    guarded: Server, made: dict[str, str], tmp_path: Path
) -> None:
    environment = settings(tmp_path, made)
    code, said = await branchline(environment, "migrate")
    assert (code, said) == (0, "")
    for service in ("task", "organization"):
        async with serving(tmp_path, service, environment) as health:
            await until_health(health, health_pb2.HealthCheckResponse.SERVING)
    states = look_into(guarded.url_of("of_task"), "SELECT count(*) FROM dbos.workflow_status")
    assert states == [(0,)]
    assert not list((tmp_path / "data").rglob("*.sqlite"))


async def refused(folder: Path, service: str, url: str) -> str:
    """Return what a service says that does not start; its password is not in it."""
    code, said = await branchline(settings(folder, {service: url}), "serve", service)
    assert code == 1
    assert PASSWORD not in said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("database", "role", "password", "words"),
    [
        ("of_task", "task_role", "wrong", 'password authentication failed for user "task_role"'),
        ("of_task", "task_role", "", "no password supplied"),
        ("of_user", "task_role", PASSWORD, 'permission denied for database "of_user"'),
        ("of_nothing", "task_role", PASSWORD, 'database "of_nothing" does not exist'),
    ],
)
async def test_a_role_that_may_not_open_a_database_is_told_so(
    guarded: Server, made: dict[str, str], tmp_path: Path, database: str, role: str, password: str, words: str
) -> None:
    said = await refused(tmp_path, "task", guarded.address_of(database, role, password))
    assert "PostgreSQL does not let task in (databases.task)" in said
    assert words in said


async def test_a_role_that_may_not_make_tables_is_told_so(
    guarded: Server, made: dict[str, str], tmp_path: Path
) -> None:
    with psycopg.connect(guarded.url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE locked")
    said = await refused(tmp_path, "user", guarded.address_of("locked", "user_role", PASSWORD))
    assert "the role of user may not make tables in its database: permission denied for schema public" in said


@pytest.mark.parametrize("url", [f"postgresql://task:{PASSWORD}%zz@host/task", f"sqlite:///{PASSWORD}"])
async def test_what_is_no_url_of_a_database_is_told_without_its_words(tmp_path: Path, url: str) -> None:
    assert "postgresql://ROLE@HOST/DATABASE" in await refused(tmp_path, "task", url)


async def test_a_password_file_that_is_not_there_is_told(guarded: Server, made: dict[str, str], tmp_path: Path) -> None:
    url = f"{guarded.address_of('of_task', 'task_role')}?password_file={tmp_path}/none"
    assert f"its password is not to be read: {tmp_path}/none cannot be read" in await refused(tmp_path, "task", url)


async def test_a_password_file_that_others_can_read_is_refused(
    guarded: Server, made: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    file.chmod(0o644)
    url = f"{guarded.address_of('of_task', 'task_role')}?password_file={file}"
    assert f"{file} is a key that others can read or change: chmod 600" in await refused(tmp_path, "task", url)


async def test_what_the_url_says_of_tls_holds(guarded: Server, made: dict[str, str], tmp_path: Path) -> None:
    url = f"{guarded.address_of('of_task', 'task_role', PASSWORD)}?sslmode=require"
    assert "server does not support SSL, but SSL was required" in await refused(tmp_path, "task", url)


async def test_commands_on_a_server_that_is_away_say_so(tmp_path: Path) -> None:
    environment = settings(tmp_path, {"history": f"postgresql://history@127.0.0.1:{free_port()}/history"})
    code, said = await branchline(environment, "migrate")
    assert (code, "Connection refused" in said, "Traceback" in said) == (2, True, False), said


async def test_two_services_are_not_given_one_database(tmp_path: Path) -> None:
    url = server().create("of_two")
    code, said = await branchline(settings(tmp_path, {"history": url}), "migrate")
    assert code == 0, said
    assert "the services history and user were given one database" in await refused(tmp_path, "user", url)


async def test_of_two_services_that_start_at_once_on_one_database_one_is_refused(tmp_path: Path) -> None:
    url = server().create("of_two_at_once")
    answers = await asyncio.gather(
        *(branchline(settings(tmp_path / name, {name: url}), "migrate") for name in ("history", "user"))
    )
    assert sorted(code for code, _ in answers) == [0, 2], answers
    assert "were given one database" in "".join(said for _, said in answers)


async def test_two_processes_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    url = server().create("of_one_twice")
    answers = await asyncio.gather(
        *(branchline(settings(tmp_path / str(number), {"organization": url}), "migrate") for number in range(3))
    )
    assert [code for code, _ in answers] == [0] * 3, answers
    assert look_into(url, "SELECT count(*) FROM alembic_version") == [(1,)]


@pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])
async def test_a_schema_newer_than_the_program_is_refused_with_both_versions(tmp_path: Path, dialect: str) -> None:
    file = f"sqlite:///{tmp_path}/data/history/history.sqlite"
    url = server().create("of_newer") if dialect == "postgresql" else ""
    code, said = await branchline(settings(tmp_path, {"history": url} if url else {}), "migrate")
    assert code == 0, said
    tamper_with(url or file, "UPDATE alembic_version SET version_num = '9999'")

    said = (
        await refused(tmp_path, "history", url)
        if url
        else (await branchline(settings(tmp_path, {}), "serve", "history"))[1]
    )

    assert re.search(r"the database of history has schema 9999, which is newer than this program: it knows \d{4}", said)


async def test_a_service_waits_for_its_server_and_says_so(tmp_path: Path) -> None:
    with running_server(port=free_port()) as late:
        late.stop()
        environment = settings(tmp_path, {"history": late.address_of("postgres", "postgres")})
        async with serving(tmp_path, "history", environment) as health:
            await until_health(health, health_pb2.HealthCheckResponse.NOT_SERVING)
            log = tmp_path / "history.log"

            async def said() -> bool:
                return "the database of history" in log.read_text() and "Connection refused" in log.read_text()

            await eventually(said)
            late.start()
            await until_health(health, health_pb2.HealthCheckResponse.SERVING)
