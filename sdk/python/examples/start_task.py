"""Give an agent something to do, see it done, and say what came of it.

BRANCHLINE_TOKEN=$(cat data/token) python start_task.py REMOTE_URL "write NOTE.md: hello"
"""

import asyncio
import os
import sys

from branchline import AsyncClient, BranchlineError
from branchline.v1.common_pb2 import Prompt
from branchline.v1.errors_pb2 import ERROR_REASON_REPOSITORY_EXISTS
from branchline.v1.repositories_pb2 import CreateRepositoryRequest
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, SendMessageRequest
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, TASK_STATE_FAILED, CreateTaskRequest
from branchline.v1.users_pb2 import GetCurrentUserRequest

ADDRESS, TOKEN = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700"), os.environ["BRANCHLINE_TOKEN"]


async def main(remote_url: str, text: str) -> None:
    async with AsyncClient(ADDRESS, TOKEN) as connection:
        client = connection.session()  # what is read through it shows what was changed through it
        me = await client.users.get_current_user(GetCurrentUserRequest())
        organization_id = me.memberships[0].organization_id
        try:
            adding = CreateRepositoryRequest(organization_id=organization_id, remote_url=remote_url)
            repository_id = (await client.repositories.create_repository(adding)).repository.id
        except BranchlineError as error:
            if error.reason != ERROR_REASON_REPOSITORY_EXISTS:
                raise
            repository_id = error.metadata["repository_id"]

        creating = CreateTaskRequest(repository_id=repository_id, prompt=Prompt(text=text))
        task = (await client.tasks.create_task(creating)).task
        print(f"{task.id} on {task.branch}")
        async with client.watch_task(task.id) as view:
            await view.wait_for(
                lambda view: view.task.activity == TASK_ACTIVITY_IDLE or view.task.state == TASK_STATE_FAILED, 600
            )
            if view.task.state == TASK_STATE_FAILED:
                sys.exit(view.task.failure.message)
            (session,) = view.sessions.values()
            sending = SendMessageRequest(
                task_id=task.id, session_id=session.id, prompt=Prompt(text="say and more"), when_busy=WHEN_BUSY_QUEUE
            )
            await client.sessions.send_message(sending)
            await view.wait_for(
                lambda view: view.sessions[session.id].turn == 2 and view.task.activity == TASK_ACTIVITY_IDLE, 600
            )
            for entry in view.transcript(session.id):
                match entry.WhichOneof("content"):
                    case "user_message":
                        print(f"> {entry.user_message.text}")
                    case "agent_message":
                        print(entry.agent_message.text.rstrip())
                    case "tool_call":
                        print(f"* {entry.tool_call.title}")
                    case _:
                        pass


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
