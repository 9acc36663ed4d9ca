"""Queries of the repository service."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline.resource.v1.repository_pb2 import Branch, PullRequest, Repository
from branchline.resource.v1.sandbox_pb2 import Sandbox
from branchline.resource.v1.session_pb2 import Session, TranscriptEntry
from branchline.resource.v1.task_pb2 import TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED, Task
from branchline.task.v1.task_pb2 import SetPullRequestRequest
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from services.repository.push import TO_TASK
from services.repository.tables import (
    branches,
    pull_requests,
    repositories,
    sandbox_index,
    session_index,
    task_details,
    task_index,
    transcript_entries,
)
from services.runtime.database import Database, Reader, Transaction
from services.runtime.errors import NotFound
from services.runtime.principal import Principal
from services.runtime.service import Chassis
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.outbox import Mark

ENDED = frozenset({TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED})
"""Statuses in which a task no longer holds its branch."""


@dataclass(frozen=True, slots=True)
class RepositoryStore:
    """Repositories, their caches, and the index of their tasks."""

    chassis: Chassis
    index: Index

    @property
    def database(self) -> Database:
        """The service's database."""
        return self.chassis.database

    async def repository(self, reader: Reader, repository_id: str, principal: Principal) -> Repository:
        """Return a repository; raise NotFound if it is not the caller's to see."""
        query = select(repositories.c.payload).where(repositories.c.id == repository_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        repository = Repository.FromString(payload) if payload is not None else None
        if repository is None or not principal.sees(repository.organization_id):
            raise NotFound("repository", repository_id)
        return repository

    async def ensure(self, tx: Transaction, request: EnsureRepositoryRequest) -> None:
        """Create a repository, or bring its name and default branch and its caches up to date."""
        query = select(repositories).where(repositories.c.id == request.repository.id)
        row = (await tx.execute(query)).one_or_none()
        if row is None:
            await tx.execute(
                insert(repositories).values(
                    id=request.repository.id,
                    organization_id=request.repository.organization_id,
                    github_revision=0,
                    payload=request.repository.SerializeToString(),
                )
            )
        else:
            held = Repository.FromString(row.payload)
            if (held.full_name, held.default_branch) != (
                request.repository.full_name,
                request.repository.default_branch,
            ):
                held.full_name = request.repository.full_name
                held.default_branch = request.repository.default_branch
                await self.save_repository(tx, held)
        if request.github and (row is None or row.github_revision < request.github_revision):
            await self._replace_caches(tx, request)

    async def _replace_caches(self, tx: Transaction, request: EnsureRepositoryRequest) -> None:
        repository_id = request.repository.id
        before = await self.pull_requests(tx, repository_id)
        await tx.execute(delete(branches).where(branches.c.repository_id == repository_id))
        await tx.execute(delete(pull_requests).where(pull_requests.c.repository_id == repository_id))
        for branch in request.branches:
            branch.repository_id = repository_id
            row = {"repository_id": repository_id, "name": branch.name, "payload": branch.SerializeToString()}
            await tx.execute(insert(branches).values(row))
        for pull in request.pull_requests:
            pull.repository_id = repository_id
            values = {"repository_id": repository_id, "number": pull.number, "payload": pull.SerializeToString()}
            await tx.execute(insert(pull_requests).values(values))
        await tx.execute(
            update(repositories)
            .where(repositories.c.id == repository_id)
            .values(github_revision=request.github_revision)
        )
        after = await self.pull_requests(tx, repository_id)
        for branch, task_id in (await self.branch_holders(tx, repository_id)).items():
            if before.get(branch) != after.get(branch):
                told = SetPullRequestRequest(task_id=task_id, pull_request=after.get(branch))
                mark = Mark(f"{task_id}/pull_request", request.github_revision, told, TO_TASK)
                await self.chassis.outbox.mark(tx, [mark])

    async def pull_requests(self, reader: Reader, repository_id: str) -> dict[str, PullRequest]:
        """Return the cached pull requests by the branch they are from."""
        query = select(pull_requests.c.payload).where(pull_requests.c.repository_id == repository_id)
        found = map(PullRequest.FromString, (await reader.execute(query)).scalars())
        return {pull.head_branch: pull for pull in found}

    async def save_repository(self, tx: Transaction, repository: Repository) -> None:
        """Store a new state of a repository and push it up."""
        repository.revision += 1
        await tx.execute(
            update(repositories)
            .where(repositories.c.id == repository.id)
            .values(payload=repository.SerializeToString())
        )
        await self.chassis.outbox.mark(tx, [Mark(repository.id, repository.revision, repository)])

    async def touch(self, tx: Transaction, repository_id: str) -> None:
        """Count the live tasks again and note that something happened."""
        query = select(repositories.c.payload).where(repositories.c.id == repository_id)
        repository = Repository.FromString((await tx.execute(query)).scalar_one())
        live = select(func.count()).where(task_index.c.repository_id == repository_id, task_index.c.live.is_(True))
        repository.live_task_count = (await tx.execute(live)).scalar_one()
        repository.activity_time.CopyFrom(self.chassis.clock.timestamp())
        await self.save_repository(tx, repository)

    async def branch_holders(self, tx: Reader, repository_id: str) -> dict[str, str]:
        """Return the live tasks' branches with the tasks' ids."""
        query = select(task_index.c.branch, task_index.c.task_id).where(
            task_index.c.repository_id == repository_id, task_index.c.live.is_(True)
        )
        return {row.branch: row.task_id for row in (await tx.execute(query)).all()}

    async def known_branches(self, tx: Transaction, repository_id: str) -> set[str]:
        """Return the names of all branches that GitHub reported."""
        query = select(branches.c.name).where(branches.c.repository_id == repository_id)
        return set((await tx.execute(query)).scalars())

    async def put_tasks(self, tx: Transaction, tasks: Sequence[Task]) -> list[Task]:
        """Index tasks' states; return those that were newer than what was held."""
        entries = [
            Entry(
                "task",
                task.id,
                task.id,
                task.revision,
                task,
                task_id=task.id,
                columns={"repository_id": task.repository_id, "organization_id": task.organization_id},
            )
            for task in tasks
        ]
        fresh = {entry.id: entry.revision for entry in await self.index.put_many(tx, "task", entries)}
        newer = {task.id: task for task in tasks if fresh.get(task.id) == task.revision}
        rows = [
            {
                "task_id": task.id,
                "repository_id": task.repository_id,
                "branch": task.branch,
                "live": task.status not in ENDED,
            }
            for task in newer.values()
        ]
        if rows:
            statement = upsert(task_index)
            changed = {name: statement.excluded[name] for name in ("branch", "live")}
            await tx.execute(statement.on_conflict_do_update(index_elements=["task_id"], set_=changed), rows)
        return list(newer.values())

    async def put_session(self, tx: Transaction, session: Session) -> None:
        """Index a session's state."""
        entry = Entry("session", session.task_id, session.id, session.revision, session, task_id=session.task_id)
        await self.index.put(tx, entry)

    async def put_sandbox(self, tx: Transaction, sandbox: Sandbox) -> None:
        """Index a sandbox's state."""
        entry = Entry("sandbox", sandbox.task_id, sandbox.id, sandbox.revision, sandbox, task_id=sandbox.task_id)
        await self.index.put(tx, entry)

    async def put_transcript_entry(self, tx: Transaction, entry: TranscriptEntry) -> None:
        """Index a transcript entry."""
        columns = {"session_id": entry.session_id, "position": entry.position}
        await self.index.put(
            tx,
            Entry(
                "transcript_entry",
                entry.task_id,
                entry.id,
                entry.revision,
                entry,
                task_id=entry.task_id,
                columns=columns,
            ),
        )

    async def task(self, reader: Reader, task_id: str, principal: Principal) -> Task:
        """Return a task; raise NotFound if it is not the caller's to see."""
        query = select(task_details.c.payload).where(task_details.c.id == task_id)
        payload = (await reader.execute(query)).scalar_one_or_none()
        task = Task.FromString(payload) if payload is not None else None
        if task is None or not principal.sees(task.organization_id):
            raise NotFound("task", task_id)
        return task

    async def held_tasks(self, tx: Transaction, task_ids: Sequence[str]) -> dict[str, Task]:
        """Return what is indexed of tasks, by their ids."""
        query = select(task_details.c.payload).where(task_details.c.id.in_(task_ids))
        held = map(Task.FromString, (await tx.execute(query)).scalars())
        return {task.id: task for task in held}

    async def sessions(self, reader: Reader, task_id: str) -> list[Session]:
        """Return a task's sessions, oldest first."""
        query = select(session_index.c.payload).where(session_index.c.scope == task_id).order_by(session_index.c.id)
        return [Session.FromString(payload) for payload in (await reader.execute(query)).scalars()]

    async def sandboxes(self, reader: Reader, task_id: str) -> list[Sandbox]:
        """Return a task's sandboxes, oldest first."""
        query = select(sandbox_index.c.payload).where(sandbox_index.c.scope == task_id).order_by(sandbox_index.c.id)
        return [Sandbox.FromString(payload) for payload in (await reader.execute(query)).scalars()]

    async def transcript(
        self, reader: Reader, session_id: str, after_position: int, limit: int
    ) -> list[TranscriptEntry]:
        """Return a page of a transcript, oldest first."""
        query = (
            select(transcript_entries.c.payload)
            .where(transcript_entries.c.session_id == session_id, transcript_entries.c.position > after_position)
            .order_by(transcript_entries.c.position)
            .limit(limit)
        )
        return [TranscriptEntry.FromString(payload) for payload in (await reader.execute(query)).scalars()]

    async def cached(self, reader: Reader, repository_id: str) -> tuple[list[Branch], list[PullRequest]]:
        """Return the cached branches and pull requests."""
        heads = select(branches.c.payload).where(branches.c.repository_id == repository_id)
        found = [Branch.FromString(payload) for payload in (await reader.execute(heads)).scalars()]
        return found, list((await self.pull_requests(reader, repository_id)).values())
