"""Runs all services in this process, or one of them, until it is told to stop."""

import asyncio
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
from branchline.organization.v1 import organization_pb2, organization_pb2_grpc

from cli.installation import SERVICES, Installation
from cli.settings import TOKEN_FILE, read_token
from services.runtime.client import open_channel
from services.runtime.principal import Signer
from services.runtime.retry import Backoff

_BOOTSTRAP_SECONDS = 30.0


@asynccontextmanager
async def everything(installation: Installation) -> AsyncGenerator[None, None]:
    """Run all services for the length of the block."""
    services = [installation.build(name) for name in SERVICES]
    async with AsyncExitStack() as stack:
        for service in services:
            await stack.enter_async_context(service.running())
        yield


async def bootstrap(installation: Installation, default_agent: str) -> tuple[str, str]:
    """Create the first user, organization and token, once; return (organization id, token).

    The token is kept in the data folder; it is empty if somebody removed it from there.
    """
    settings = installation.settings
    signer = Signer(installation.signing_key.get_secret_value(), "cli")
    async with open_channel(installation.addresses.organization, signer) as channel:
        request = organization_pb2.BootstrapRequest(
            slug="home",
            organization_name="Home",
            user_name="First User",
            user_email="first.user@localhost",
            default_agent=default_agent,
        )
        answer = await _once_all_are_up(organization_pb2_grpc.OrganizationServiceStub(channel), request)
    path = settings.data_dir / TOKEN_FILE
    if answer.api_token:
        path.touch(mode=0o600)
        path.write_text(answer.api_token)
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


async def until_stopped() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    await stop.wait()
