"""Runs all services in this process, and gives an installation its first user."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from branchline_internal.organization.v1 import organization_pb2, organization_pb2_grpc
from rich.console import Console

from cli import views
from cli.installation import (
    SERVICES,
    Installation,
    distributed_installation,
    local_installation,
    with_scripted_agents,
)
from cli.isolation import require_isolation
from cli.server import configure, isolation_of, until_stopped
from cli.settings import TOKEN_FILE, read_token
from services.runtime.migrations import bring_up_to_date
from services.runtime.principal import OPERATOR
from services.runtime.retry import Backoff
from services.runtime.secrets import write_whole
from services.runtime.service import Service, once_reachable

_BOOTSTRAP_SECONDS = 30.0


async def up(console: Console, data_dir: Path, agent: str, isolation: str | None) -> None:
    """Run all services until the process is told to stop."""
    given: dict[str, Any] = {} if isolation is None else {"sandbox": {"local": {"isolation": isolation}}}
    settings = configure(data_dir, **given)
    settings = configure(data_dir, sandbox=with_scripted_agents(settings))
    installation = local_installation(settings)
    await require_isolation(isolation_of(installation))
    async with everything(installation) as services:
        organization_id, token = await bootstrap(installation, agent)
        addresses = {name: service.address for name, service in services.items()}
        views.print_welcome(console, addresses, organization_id, token)
        console.print("\nBranchline is up. Ctrl-C stops it; agents at work go on and are found again.")
        await until_stopped()


async def bootstrap_apart(console: Console, data_dir: Path, agent: str) -> None:
    """Create the first user, organization and token of services that run apart."""
    installation = distributed_installation(configure(data_dir))
    organization_id, _token = await bootstrap(installation, agent)
    kept = f"in {installation.settings.data_dir / TOKEN_FILE}"  # what this prints may be kept, in a container's log
    views.print_welcome(console, installation.addresses, organization_id, kept)


@asynccontextmanager
async def everything(installation: Installation) -> AsyncGenerator[dict[str, Service], None]:
    """Run all services for the length of the block, their databases brought up to date before; yield them by name."""
    services = {name: installation.build(name) for name in SERVICES}
    await once_reachable(partial(bring_up_to_date, installation.databases()), "the databases' server")
    async with AsyncExitStack() as stack:
        for service in services.values():
            await stack.enter_async_context(service.running())
        yield services


async def bootstrap(installation: Installation, default_agent: str) -> tuple[str, str]:
    """Create the first user, organization and token, once; return (organization id, token).

    The token is kept in the data folder; it is empty if somebody removed it from there.
    """
    settings = installation.settings
    channel: Any = installation.neighbours(OPERATOR).open("organization")
    request = organization_pb2.BootstrapRequest(
        slug="home",
        organization_name="Home",
        user_name="First User",
        user_email="first.user@localhost",
        default_agent=default_agent,
    )
    try:
        answer = await _once_all_are_up(organization_pb2_grpc.OrganizationServiceStub(channel), request)
    finally:
        await channel.close()
    path = settings.data_dir / TOKEN_FILE
    if answer.api_token:
        write_whole(path, answer.api_token.encode())
    return answer.organization.id, read_token(settings.data_dir)


async def _once_all_are_up(
    stub: organization_pb2_grpc.OrganizationServiceStub, request: organization_pb2.BootstrapRequest
) -> organization_pb2.BootstrapResponse:
    """Bootstrap, which is idempotent, as soon as organization and its children answer."""
    backoff = Backoff(most_seconds=1.0)
    deadline = asyncio.get_running_loop().time() + _BOOTSTRAP_SECONDS
    while True:
        try:
            return await stub.Bootstrap(request, timeout=_BOOTSTRAP_SECONDS, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(backoff.next_seconds())
