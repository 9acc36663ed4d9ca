"""`branchline github`, for the installation's operator."""

from typing import Annotated

import typer
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub

from cli.calls import operated, operating
from cli.terminal import DEFAULT_DATA, DataDir, console, run

app = typer.Typer(no_args_is_help=True, help="GitHub, for the installation's operator.")


@app.callback()
def main() -> None:
    """Keep `bind` a command of its own name: Typer would make the only command of a group the group."""


@app.command()
def bind(
    slug: Annotated[str, typer.Argument(help="The organization's slug.")],
    login: Annotated[str, typer.Argument(help="The GitHub login whose repositories it may see; empty unbinds.")],
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Bind a GitHub login to one organization: the installation's token shows it what the login owns."""

    async def job() -> None:
        async with operating(operated(data_dir), "organization", OrganizationServiceStub) as organization:
            request = organization_pb2.BindGithubLoginRequest(slug=slug, github_login=login)
            await organization.BindGithubLogin(request)
            console.print(f"{slug} is bound to {login}" if login else f"{slug} is bound to no login")

    run(job())
