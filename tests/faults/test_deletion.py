"""A deletion that was acknowledged is done to its end, whoever is killed in it."""

import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from branchline.v1 import repositories_pb2, tasks_pb2

from tests.faults.test_kills import Books, settled
from tests.faults.test_restart import COUNT, IDLE, create_task, send, some_words, until
from tests.support.people import insist
from tests.support.process import SERVICES, own_processes
from tests.support.stack import eventually
from tests.support.views import View


@pytest.mark.timeout(300)
async def test_a_repository_is_deleted_with_its_tasks_though_all_are_killed_in_it(
    tmp_path: Path,
) -> None:  # ORG-9
    processes = own_processes(tmp_path)
    books = Books(processes)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(processes.stop)
        for name in SERVICES:
            await processes.start(name, "serve", name)
        await processes.start("bootstrap", "bootstrap", "--agent", "mock")
        client, organization_id = await processes.client(stack)
        task = await create_task(client, organization_id, tmp_path, "go")
        task = await until(client, task.id, IDLE)
        await create_task(client, organization_id, tmp_path, "go", hold=False)
        view = View("organization", client.watch_organization(organization_id)).open()
        stack.push_async_callback(view.close)
        await send(client, task, COUNT)
        await eventually(lambda: some_words(client, task))
        doomed = repositories_pb2.DeleteRepositoryRequest(
            request_id=str(uuid.uuid4()), repository_id=task.repository_id
        )

        assert await insist(lambda: client.repositories.DeleteRepository(doomed, timeout=10)) is not None
        for names in (("repository", "task"), ("sandbox", "organization"), SERVICES):
            for name in names:
                await processes.kill(name)
            for name in names:
                await processes.start(name, "serve", name)

        async def gone() -> bool:
            request = tasks_pb2.ListTasksRequest(organization_id=organization_id, page_size=1000)
            listed = await insist(lambda: client.tasks.ListTasks(request, timeout=5))
            return listed is not None and task.id not in {one.id for one in listed.tasks}

        await eventually(gone, 120)
        await settled(books)
        assert task.id not in {one.id for one in books.tasks()}

        async def told() -> bool:
            repositories, tasks = view.of("repository"), view.of("task")
            return len(repositories) == 1 and task.repository_id not in repositories and task.id not in tasks

        await eventually(told, 20)

        async def forgotten() -> bool:
            return not books.rows("sandbox", f"SELECT id FROM sandboxes WHERE task_id = '{task.id}'")

        await eventually(forgotten, 20)
        assert len(books.rows("sandbox", "SELECT id FROM sandboxes")) == 1
        assert not list((tmp_path / "data" / "sandbox" / "local").glob(f"{task.active_sandbox_id}*"))
