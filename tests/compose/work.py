"""What people do on an installation, for the tests of this folder."""

from branchline.v1 import repositories_pb2, secrets_pb2, tasks_pb2, users_pb2
from branchline.v1.common_pb2 import Prompt
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, TASK_STATE_FAILED, Task

from tests.compose.installation import GIT_HOST, GIT_NAME, GIT_PASSWORD, REMOTE
from tests.support.client import Client
from tests.support.people import get_task, insist
from tests.support.stack import eventually, request_id

PUSHED_SECONDS = 120.0


async def organization_of(client: Client) -> str:
    """Return the first organization's id."""
    me = await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
    return me.memberships[0].organization_id


async def git_repository(client: Client) -> str:
    """Return the git server's repository, made with the credential for it where it is not there."""
    organization_id = await organization_of(client)
    listed = await client.repositories.ListRepositories(
        repositories_pb2.ListRepositoriesRequest(organization_id=organization_id)
    )
    for repository in listed.repositories:
        if repository.remote_url == REMOTE:
            return repository.id
    credential = secrets_pb2.GitCredential(host=GIT_HOST, username=GIT_NAME)
    await client.secrets.CreateSecret(
        secrets_pb2.CreateSecretRequest(
            request_id=request_id(),
            secret=secrets_pb2.Secret(git_credential=credential),
            value=GIT_PASSWORD.encode(),
        )
    )
    request = repositories_pb2.CreateRepositoryRequest(
        request_id=request_id(), organization_id=organization_id, remote_url=REMOTE
    )
    return (await client.repositories.CreateRepository(request)).repository.id


async def create_task(client: Client, repository_id: str, script: str) -> Task:
    request = tasks_pb2.CreateTaskRequest(
        request_id=request_id(), repository_id=repository_id, prompt=Prompt(text=script)
    )
    answer = await insist(lambda: client.tasks.CreateTask(request, timeout=20))
    assert answer is not None
    return answer.task


async def finished(client: Client, task_id: str) -> Task:
    """Return a task once its agent has finished. Fail if it failed."""

    async def look() -> Task | None:
        task = await get_task(client, task_id)
        assert task.state != TASK_STATE_FAILED, task.failure
        return task if task.activity == TASK_ACTIVITY_IDLE else None

    return await eventually(look, PUSHED_SECONDS)
