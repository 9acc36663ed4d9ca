"""`branchline token`: your own API tokens, and the first one of somebody else."""

from typing import Annotated

import typer
from branchline import AsyncClient, pages
from branchline.v1 import users_pb2
from branchline.v1.roles_pb2 import ROLE_VIEWER
from branchline.v1.users_pb2 import TokenScope
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub

from cli.calls import operated, operating, run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console, run

app = typer.Typer(no_args_is_help=True, help="API tokens.")


@app.command()
def create(
    name: str,
    read_only: Annotated[bool, typer.Option(help="A token that only reads and watches.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Create an API token of yours; it is shown this once."""
    scope = TokenScope(role=ROLE_VIEWER) if read_only else None

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = users_pb2.CreateApiTokenRequest(display_name=name, scope=scope)
        answer = await client.users.create_api_token(request)
        console.print(f"{answer.api_token.id}: [bold]{answer.secret}[/bold]", soft_wrap=True)

    run_as_client(data_dir, job)


@app.command("list")
def list_tokens(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List your API tokens."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = users_pb2.ListApiTokensRequest()
        async for token in pages(client.users.list_api_tokens, request, lambda page: page.api_tokens):
            console.print(f"{token.id}  {token.display_name}", markup=False)

    run_as_client(data_dir, job)


@app.command()
def revoke(token_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """End an API token of yours."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        await client.users.revoke_api_token(users_pb2.RevokeApiTokenRequest(api_token_id=token_id))
        console.print(f"{token_id} revoked")

    run_as_client(data_dir, job)


@app.command()
def issue(
    email: str,
    name: Annotated[str, typer.Option(help="Name of the token.")] = "first token",
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Make an API token for a person, as the installation's operator; it is shown this once."""

    async def job() -> None:
        async with operating(operated(data_dir), "organization", OrganizationServiceStub) as organization:
            request = organization_pb2.IssueTokenRequest(email=email, name=name)
            console.print((await organization.IssueToken(request)).api_token, soft_wrap=True, highlight=False)

    run(job())
