"""`branchline repo`."""

import typer
from branchline.client import Client
from branchline.v1 import repositories_pb2

from cli import views
from cli.calls import pages, request_id, run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer(no_args_is_help=True, help="Repositories.")


@app.command()
def add(url: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Add a repository by git URL."""

    async def job(client: Client, organization_id: str) -> None:
        request = repositories_pb2.AddRepositoryRequest(
            request_id=request_id(), organization_id=organization_id, remote_url=url
        )
        answer = await client.repositories.AddRepository(request)
        console.print(f"{answer.repository.full_name} added as [bold]{answer.repository.id}[/bold]")

    run_as_client(data_dir, job)


@app.command("list")
def list_repositories(data_dir: DataDir = DEFAULT_DATA) -> None:
    """List the repositories."""

    async def job(client: Client, organization_id: str) -> None:
        request = repositories_pb2.ListRepositoriesRequest(organization_id=organization_id, page_size=1000)
        found = [
            one async for page in pages(client.repositories.ListRepositories, request) for one in page.repositories
        ]
        console.print(views.repository_table(found))

    run_as_client(data_dir, job)


@app.command()
def delete(repository_id: str, data_dir: DataDir = DEFAULT_DATA) -> None:
    """Delete a repository with its tasks and sandboxes; the branches stay on the remote."""

    async def job(client: Client, _organization_id: str) -> None:
        request = repositories_pb2.DeleteRepositoryRequest(request_id=request_id(), repository_id=repository_id)
        await client.repositories.DeleteRepository(request)
        console.print(f"{repository_id} is being deleted")

    run_as_client(data_dir, job)
