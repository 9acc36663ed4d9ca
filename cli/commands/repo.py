"""`branchline repo`."""

import typer
from branchline import AsyncClient, pages
from branchline.v1 import repositories_pb2

from cli import views
from cli.calls import run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer(no_args_is_help=True, help="Repositories.")


@app.command()
def add(url: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Add a repository by git URL."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = repositories_pb2.CreateRepositoryRequest(organization_id=organization_id, remote_url=url)
        answer = await client.repositories.create_repository(request)
        console.print(f"{answer.repository.display_name} added as [bold]{answer.repository.id}[/bold]")

    run_as_client(data_dir, job)


@app.command("list")
def list_repositories(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the repositories."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = repositories_pb2.ListRepositoriesRequest(organization_id=organization_id, page_size=1000)
        listing = client.repositories.list_repositories
        found = [one async for one in pages(listing, request, lambda page: page.repositories)]
        console.print(views.repository_table(found))

    run_as_client(data_dir, job)


@app.command()
def delete(repository_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Delete a repository with its tasks and sandboxes; the branches stay on the remote."""

    async def job(client: AsyncClient, _organization_id: str) -> None:
        request = repositories_pb2.DeleteRepositoryRequest(repository_id=repository_id)
        await client.repositories.delete_repository(request)
        console.print(f"{repository_id} is being deleted")

    run_as_client(data_dir, job)
