"""How what the organization's children push becomes rows: index rows, and work handed to other children."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.github_data.v1.github_data_pb2 import GithubRepository
from branchline.repository.v1.repository_pb2 import EnsureRepositoryRequest
from branchline.resource.v1 import repository_pb2
from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.organization_pb2 import GithubStatus
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.task_pb2 import Task
from branchline.resource.v1.user_pb2 import User, UserTaskState
from branchline.user.v1.user_pb2 import ApiTokenState, MarkUnreadRequest
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.dialects.sqlite import insert as upsert

from services.organization.store import OrganizationStore
from services.organization.tables import auth_email_index, auth_session_index, task_lookup, users
from services.runtime.database import Transaction
from services.runtime.service import Chassis
from services.runtime.spine.index import Entry
from services.runtime.spine.ingest import Handler, Ingest, Pushed, RejectedEntryError, each, handlers
from services.runtime.spine.outbox import Mark

TO_HISTORY = "history"
TO_REPOSITORY = "repository"
TO_USER = "user"
TO_GITHUB_DATA = "github_data"

NEWSWORTHY = frozenset({"agent.finished", "agent.failed", "agent.asked", "task.failed"})
"""Kinds of events that make a task unread for its members."""


@dataclass(frozen=True, slots=True)
class OrganizationIngest:
    """Handlers for everything that arrives at the root."""

    chassis: Chassis
    store: OrganizationStore

    def ingest(self) -> Ingest:
        """Return the ingest with all handlers."""
        taken = handlers(
            Handler(Task, self.tasks),
            Handler(Repository, each(self.repository)),
            Handler(HistoryEvent, each(self.history_event)),
            Handler(User, each(self.user)),
            Handler(ApiTokenState, each(self.api_token)),
            Handler(UserTaskState, each(self.user_task_state)),
            Handler(GithubRepository, each(self.github_repository)),
            Handler(GithubStatus, each(self.github_status)),
        )
        return Ingest(self.chassis.database, taken)

    async def tasks(self, tx: Transaction, pushed: Sequence[Pushed[Task]]) -> None:
        """Index tasks for the sidebar and for routing."""
        fresh = await self.store.index.put_many(tx, "task", [self._summary(one.state) for one in pushed])
        routes = [
            {"task_id": entry.id, "organization_id": entry.scope, "repository_id": entry.columns["repository_id"]}
            for entry in fresh
        ]
        if routes:
            await tx.execute(upsert(task_lookup).on_conflict_do_nothing(), routes)

    def _summary(self, task: Task) -> Entry:
        if not task.organization_id or not task.repository_id:
            raise RejectedEntryError(f"task {task.id} names no organization or repository")
        columns = {
            "repository_id": task.repository_id,
            "title": task.title,
            "branch": task.branch,
            "status": task.status,
            "owner_user_id": task.owner_user_id,
            "create_time": _seconds(task.create_time),
            "update_time": _seconds(task.update_time),
            "has_pull_request": task.HasField("pull_request"),
        }
        scope = task.organization_id
        return Entry("task", scope, task.id, task.revision, task, task_id=task.id, columns=columns)

    async def repository(self, tx: Transaction, pushed: Pushed[Repository]) -> None:
        """Index a repository."""
        await self.store.save_repository(tx, pushed.state)

    async def history_event(self, tx: Transaction, pushed: Pushed[HistoryEvent]) -> None:
        """Hand a new event to history; index it once history has numbered it."""
        event = pushed.state
        if not event.sequence:
            await self.chassis.outbox.mark(tx, [Mark(event.id, 1, event, TO_HISTORY)])
            await self._mark_unread(tx, event)
            return
        columns = {
            "sequence": event.sequence,
            "event_time": _seconds(event.event_time),
            "event_kind": event.kind,
            "actor_user_id": event.actor_user_id,
            "repository_id": event.repository_id,
            "branch": event.branch,
        }
        entry = Entry(
            "history_event",
            event.organization_id,
            event.id,
            1,
            event,
            task_id=event.task_id,
            columns=columns,
        )
        await self.store.index.put(tx, entry)

    async def _mark_unread(self, tx: Transaction, event: HistoryEvent) -> None:
        if event.kind not in NEWSWORTHY:
            return
        members = await self.store.members_of(tx, event.organization_id)
        request = MarkUnreadRequest(
            organization_id=event.organization_id,
            user_ids=[member.user_id for member in members],
            task_id=event.task_id,
            session_id=event.session_id,
            event_id=event.id,
        )
        await self.chassis.outbox.mark(tx, [Mark(event.id, 1, request, TO_USER)])

    async def user(self, tx: Transaction, pushed: Pushed[User]) -> None:
        """Index a user's profile and e-mail address."""
        user = pushed.state
        values = {"revision": user.revision, "payload": user.SerializeToString()}
        statement = upsert(users).values(user_id=user.id, **values)
        await tx.execute(
            statement.on_conflict_do_update(
                index_elements=["user_id"], set_=values, where=users.c.revision < user.revision
            )
        )
        if user.email:
            statement = upsert(auth_email_index).values(email=user.email, user_id=user.id)
            await tx.execute(statement.on_conflict_do_nothing())
        tx.after_commit.append(self.store.index.hub.changed.notify)

    async def api_token(self, tx: Transaction, pushed: Pushed[ApiTokenState]) -> None:
        """Index a token's hash."""
        token, state = pushed.state.api_token, pushed.state
        values = {
            "token_hash": state.token_hash,
            "user_id": token.user_id,
            "revision": token.revision,
            "expire_time": _seconds(token.expire_time) if token.HasField("expire_time") else None,
            "revoked": state.HasField("revoke_time"),
            "payload": token.SerializeToString(),
        }
        statement = upsert(auth_session_index).values(token_id=token.id, **values)
        await tx.execute(
            statement.on_conflict_do_update(
                index_elements=["token_id"], set_=values, where=auth_session_index.c.revision < token.revision
            )
        )
        tx.after_commit.append(self.store.index.hub.changed.notify)

    async def user_task_state(self, tx: Transaction, pushed: Pushed[UserTaskState]) -> None:
        """Index what one user has open, unread and half written."""
        state = pushed.state
        entry = Entry(
            "user_task_state",
            state.organization_id,
            pushed.id,
            state.revision,
            state,
            viewer_id=state.user_id,
            task_id=state.task_id,
        )
        await self.store.index.put(tx, entry)

    async def github_status(self, tx: Transaction, pushed: Pushed[GithubStatus]) -> None:
        """Index how the GitHub cache stands."""
        status = pushed.state
        entry = Entry("github_status", status.organization_id, status.organization_id, status.revision, status)
        await self.store.index.put(tx, entry)

    async def github_repository(self, tx: Transaction, pushed: Pushed[GithubRepository]) -> None:
        """Create the repository child that GitHub reports, and pass branches and pull requests down to it."""
        reported = pushed.state
        organization_id = reported.organization_id
        repository_id = await self.store.github_repository_id(tx, organization_id, reported.github_id)
        repository = await self.store.repository(tx, repository_id) if repository_id else None
        if repository is None:
            repository = await self.store.repository_by_url(tx, organization_id, reported.clone_url)
        if repository is None:
            organization = await self.store.organization(tx, organization_id)
            if not organization.settings.auto_import_repositories:
                return
            now = self.chassis.clock.timestamp()
            repository = Repository(
                id=self.chassis.clock.new_id("repo"),
                organization_id=organization_id,
                source=repository_pb2.REPOSITORY_SOURCE_GITHUB,
                remote_url=reported.clone_url,
                full_name=reported.full_name,
                default_branch=reported.default_branch,
                create_time=now,
                activity_time=now,
                revision=1,
            )
            await self.store.save_repository(tx, repository)
        await self.store.link_github_repository(tx, organization_id, reported.github_id, repository.id)
        repository.full_name = reported.full_name
        repository.default_branch = reported.default_branch
        request = EnsureRepositoryRequest(
            repository=repository,
            github=True,
            branches=reported.branches,
            pull_requests=reported.pull_requests,
            github_revision=reported.revision,
        )
        await self.chassis.outbox.mark(tx, [Mark(f"{repository.id}/github", reported.revision, request, TO_REPOSITORY)])


def _seconds(time: Timestamp) -> float:
    return time.ToNanoseconds() / 1e9
