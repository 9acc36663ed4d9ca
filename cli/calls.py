"""How commands call: the gateway as any client, the services as the installation's operator."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from branchline import AsyncClient
from branchline.v1.users_pb2 import GetCurrentUserRequest

from cli.installation import Installation, known_installation
from cli.settings import SettingsError, load_settings, read_token
from cli.terminal import run
from services.runtime.principal import OPERATOR

S = TypeVar("S")

Job = Callable[[AsyncClient, str], Awaitable[int | None]]


def run_as_client(data_dir: Path, job: Job) -> None:
    """Run a job with a client and the caller's first organization."""
    run(_as_client(data_dir, job))


def address() -> str:
    """Return where the gateway is."""
    return os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700")


def _ca() -> str | None:
    """Return the file of the authorities to believe; None stands for the system's."""
    return os.environ.get("BRANCHLINE_CA") or None


def _insecure() -> bool | None:
    """Return whether plaintext is wanted, or not, whatever the address; None where nothing was said."""
    said = os.environ.get("BRANCHLINE_INSECURE")
    return said == "true" if said else None


async def _as_client(data_dir: Path, job: Job) -> int | None:
    token = os.environ.get("BRANCHLINE_TOKEN") or read_token(data_dir)
    if not token:
        raise SettingsError("set BRANCHLINE_TOKEN, or name the data folder of a running `branchline up`")
    async with AsyncClient(address(), token, ca=_ca(), insecure=_insecure()) as client:
        me = await client.users.get_current_user(GetCurrentUserRequest())
        return await job(client.session(), me.memberships[0].organization_id if me.memberships else "")


def operated(data_dir: Path) -> Installation:
    """Return the installation whose operator runs this command: who can read its key."""
    return known_installation(load_settings(data_dir=data_dir))


@asynccontextmanager
async def operating(installation: Installation, service: str, stub: Callable[[Any], S]) -> AsyncGenerator[S, None]:
    """Give a stub of a service that signs calls as the operator."""
    channel = installation.neighbours(OPERATOR).open(service)
    try:
        yield stub(channel)
    finally:
        await channel.close()
