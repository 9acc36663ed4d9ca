"""`branchline org`."""

from typing import Annotated

import typer
from branchline import AsyncClient, pages
from branchline.v1 import organizations_pb2

from cli.calls import run_as_client
from cli.settings import SettingsError
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer(no_args_is_help=True, help="Organizations.")


@app.command("list")
def list_organizations(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the organizations that you are a member of."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = organizations_pb2.ListOrganizationsRequest()
        found = pages(client.organizations.list_organizations, request, lambda page: page.organizations)
        async for organization in found:
            console.print(f"{organization.id}  {organization.slug}", highlight=False)

    run_as_client(data_dir, job)


@app.command()
def delete(
    organization_id: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do it: there is no way back.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Delete an organization with everything in it, sandboxes included."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        if not yes:
            raise SettingsError("this deletes the organization with everything in it: repeat it with --yes")
        request = organizations_pb2.DeleteOrganizationRequest(organization_id=organization_id)
        await client.organizations.delete_organization(request)
        console.print(f"{organization_id} is being deleted")

    run_as_client(data_dir, job)
