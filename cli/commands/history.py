"""`branchline history`."""

import sys
from typing import Annotated

import typer
from branchline import AsyncClient, pages
from branchline.v1 import history_pb2
from google.protobuf.json_format import MessageToJson

from cli import views
from cli.calls import run_as_client
from cli.terminal import DEFAULT_DATA, DataDir, console

app = typer.Typer()


@app.command()
def history(
    task: Annotated[str, typer.Option(help="Only this task.")] = "",
    json: Annotated[bool, typer.Option(help="All events as JSON lines, oldest first.")] = False,
    data_dir: DataDir = DEFAULT_DATA,
) -> None:
    """Show what happened."""

    async def job(client: AsyncClient, organization_id: str) -> None:
        request = history_pb2.ListHistoryEventsRequest(
            organization_id=organization_id,
            filter=history_pb2.HistoryFilter(task_ids=[task] if task else []),
            order_by="sequence" if json else "sequence desc",
            page_size=1000 if json else 50,
        )
        if not json:
            for event in reversed((await client.history.list_history_events(request)).events):
                views.print_event(console, event)
            return
        async for event in pages(client.history.list_history_events, request, lambda page: page.events):
            sys.stdout.write(MessageToJson(event, indent=None) + "\n")

    run_as_client(data_dir, job)
