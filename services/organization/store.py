"""Queries of the organization service."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchline.gateway.v1 import history_pb2, tasks_pb2
from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.organization_pb2 import GithubStatus, Member, Organization
from branchline.resource.v1.repository_pb2 import Repository
from branchline.resource.v1.task_pb2 import TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED, Task
from branchline.resource.v1.user_pb2 import ApiToken, User
from sqlalchemy import Row, Select, select, tuple_
from sqlalchemy.dialects.sqlite import insert as upsert

from services.organization.tables import (
    HISTORY,
    auth_email_index,
    auth_session_index,
    github_repositories,
    github_status,
    history_feed,
    members,
    organizations,
    repositories,
    task_lookup,
    task_summaries,
    users,
)
from services.runtime.clock import Clock
from services.runtime.database import Database, Reader, Transaction
from services.runtime.errors import InvalidArgument, NotFound
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.tokens import page_token, parse_page_token

_SORT_COLUMNS = {
    tasks_pb2.TASK_SORT_UNSPECIFIED: (task_summaries.c.update_time, True),
    tasks_pb2.TASK_SORT_CREATE_TIME: (task_summaries.c.create_time, True),
    tasks_pb2.TASK_SORT_TITLE: (task_summaries.c.title, False),
}

_RETENTION_DAYS = 90
_RETENTION_LOOK_SECONDS = 3600.0
_DAY_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class OrganizationStore:
    """Organizations, members, and what is indexed of everything below."""

    database: Database
    index: Index
    clock: Clock

    async def save_organization(self, tx: Transaction, organization: Organization) -> None:
        """Store a new state of an organization."""
        organization.revision += 1
        entry = Entry(
            "organization",
            organization.id,
            organization.id,
            organization.revision,
            organization,
            columns={"slug": organization.slug},
        )
        await self.index.put(tx, entry)

    async def save_member(self, tx: Transaction, member: Member) -> None:
        """Store a new state of a member."""
        member.revision += 1
        entry = Entry(
            "member",
            member.organization_id,
            member_id(member),
            member.revision,
            member,
            columns={"role": member.role, "user_id": member.user_id},
        )
        await self.index.put(tx, entry)

    async def save_repository(self, tx: Transaction, repository: Repository) -> bool:
        """Store a repository as its owner pushed it, or as it is born."""
        entry = Entry(
            "repository",
            repository.organization_id,
            repository.id,
            repository.revision,
            repository,
            columns={"full_name": repository.full_name, "remote_url": repository.remote_url},
        )
        return await self.index.put(tx, entry)

    async def organization(self, reader: Reader, organization_id: str) -> Organization:
        """Return an organization; raise NotFound."""
        payload = await _one(reader, select(organizations.c.payload).where(organizations.c.id == organization_id))
        if payload is None:
            raise NotFound("organization", organization_id)
        return Organization.FromString(payload)

    async def organization_by_slug(self, reader: Reader, slug: str) -> Organization | None:
        """Return an organization, or None."""
        payload = await _one(reader, select(organizations.c.payload).where(organizations.c.slug == slug))
        return Organization.FromString(payload) if payload is not None else None

    async def repository(self, reader: Reader, repository_id: str) -> Repository | None:
        """Return a repository, or None."""
        payload = await _one(reader, select(repositories.c.payload).where(repositories.c.id == repository_id))
        return Repository.FromString(payload) if payload is not None else None

    async def repository_by_url(self, reader: Reader, organization_id: str, remote_url: str) -> Repository | None:
        """Return the organization's repository with this URL, or None."""
        query = select(repositories.c.payload).where(
            repositories.c.scope == organization_id,
            repositories.c.remote_url == remote_url,
            repositories.c.deleted.is_(False),
        )
        payload = await _one(reader, query)
        return Repository.FromString(payload) if payload is not None else None

    async def github_repository_id(self, tx: Transaction, organization_id: str, github_id: int) -> str | None:
        """Return our id of a GitHub repository, or None."""
        query = select(github_repositories.c.repository_id).where(
            github_repositories.c.organization_id == organization_id, github_repositories.c.github_id == github_id
        )
        return await _one(tx, query)

    async def link_github_repository(
        self, tx: Transaction, organization_id: str, github_id: int, repository_id: str
    ) -> None:
        """Remember which of our repositories a GitHub repository is."""
        values = {"organization_id": organization_id, "github_id": github_id, "repository_id": repository_id}
        await tx.execute(upsert(github_repositories).values(values).on_conflict_do_nothing())

    async def github_status(self, reader: Reader, organization_id: str) -> GithubStatus:
        """Return how the organization's GitHub cache stands."""
        payload = await _one(reader, select(github_status.c.payload).where(github_status.c.id == organization_id))
        return GithubStatus.FromString(payload) if payload is not None else GithubStatus()

    async def member(self, reader: Reader, organization_id: str, user_id: str) -> Member | None:
        """Return a membership, or None."""
        query = select(members.c.payload).where(
            members.c.scope == organization_id, members.c.user_id == user_id, members.c.deleted.is_(False)
        )
        payload = await _one(reader, query)
        return Member.FromString(payload) if payload is not None else None

    async def members_of(self, reader: Reader, organization_id: str) -> list[Member]:
        """Return the members, by display name."""
        rows = await _all(
            reader, select(members.c.payload).where(members.c.scope == organization_id, members.c.deleted.is_(False))
        )
        found = [Member.FromString(row.payload) for row in rows]
        return sorted(found, key=lambda member: (member.display_name.casefold(), member.user_id))

    async def memberships(self, reader: Reader, user_id: str) -> list[Member]:
        """Return what a user is a member of."""
        rows = await _all(
            reader, select(members.c.payload).where(members.c.user_id == user_id, members.c.deleted.is_(False))
        )
        return [Member.FromString(row.payload) for row in rows]

    async def task_route(self, reader: Reader, task_id: str) -> tuple[str, str] | None:
        """Return (organization id, repository id) of a task, or None."""
        rows = await _all(reader, select(task_lookup).where(task_lookup.c.task_id == task_id))
        return (rows[0].organization_id, rows[0].repository_id) if rows else None

    async def user(self, reader: Reader, user_id: str) -> User | None:
        """Return a user's profile as last pushed, or None."""
        payload = await _one(reader, select(users.c.payload).where(users.c.user_id == user_id))
        return User.FromString(payload) if payload is not None else None

    async def user_id_by_email(self, reader: Reader, email: str) -> str | None:
        """Return the user with this address, or None."""
        return await _one(reader, select(auth_email_index.c.user_id).where(auth_email_index.c.email == email))

    async def valid_token(self, reader: Reader, token_hash: str, now_seconds: float) -> ApiToken | None:
        """Return what is known of a token that is neither expired nor revoked, or None."""
        rows = await _all(reader, select(auth_session_index).where(auth_session_index.c.token_hash == token_hash))
        if not rows or rows[0].revoked or (rows[0].expire_time is not None and rows[0].expire_time <= now_seconds):
            return None
        return ApiToken.FromString(rows[0].payload)

    async def api_tokens(self, reader: Reader, user_id: str) -> list[ApiToken]:
        """Return a user's valid tokens, newest first."""
        query = select(auth_session_index.c.payload).where(
            auth_session_index.c.user_id == user_id, auth_session_index.c.revoked.is_(False)
        )
        rows = await _all(reader, query.order_by(auth_session_index.c.token_id.desc()))
        return [ApiToken.FromString(row.payload) for row in rows]

    async def list_repositories(self, organization_id: str, page_size: int, token: str) -> tuple[list[Repository], str]:
        """Return a page of the catalogue, by name, and the next page's token."""
        query = select(repositories).where(repositories.c.scope == organization_id, repositories.c.deleted.is_(False))
        if token:
            name, last_id = _cursor(token)
            query = query.where(tuple_(repositories.c.full_name, repositories.c.id) > tuple_(name, last_id))
        query = query.order_by(repositories.c.full_name, repositories.c.id).limit(page_size + 1)
        async with self.database.read() as connection:
            rows = await _all(connection, query)
        page, following = _page(rows, page_size, "full_name")
        return [Repository.FromString(row.payload) for row in page], following

    async def list_tasks(self, request: tasks_pb2.ListTasksRequest) -> tuple[list[Task], str]:
        """Return a page of the sidebar and the next page's token."""
        table = task_summaries
        query = select(table).where(table.c.scope == request.organization_id, table.c.deleted.is_(False))
        if request.statuses:
            query = query.where(table.c.status.in_(request.statuses))
        else:
            query = query.where(table.c.status.not_in([TASK_STATUS_ARCHIVED, TASK_STATUS_KILLED]))
        if request.repository_id:
            query = query.where(table.c.repository_id == request.repository_id)
        if request.owner_user_id:
            query = query.where(table.c.owner_user_id == request.owner_user_id)
        if request.HasField("has_pull_request"):
            query = query.where(table.c.has_pull_request.is_(request.has_pull_request))
        if request.query:
            like = request.query
            query = query.where(
                table.c.title.icontains(like, autoescape=True) | table.c.branch.icontains(like, autoescape=True)
            )
        column, descending = _SORT_COLUMNS[request.sort]
        if request.page_token:
            position = tuple_(*_cursor(request.page_token))
            place = tuple_(column, table.c.id)
            query = query.where(place < position if descending else place > position)
        order = (column.desc(), table.c.id.desc()) if descending else (column, table.c.id)
        page_size = request.page_size or 50
        async with self.database.read() as connection:
            rows = await _all(connection, query.order_by(*order).limit(page_size + 1))
        page, following = _page(rows, page_size, column.name)
        return [Task.FromString(row.payload) for row in page], following

    async def list_history(self, request: history_pb2.ListHistoryRequest) -> tuple[list[HistoryEvent], str]:
        """Return a page of the feed and the next page's token."""
        table = history_feed
        query = select(table).where(table.c.scope == request.organization_id)
        for column, value in (
            (table.c.repository_id, request.repository_id),
            (table.c.task_id, request.task_id),
            (table.c.branch, request.branch),
            (table.c.actor_user_id, request.user_id),
        ):
            if value:
                query = query.where(column == value)
        if request.kinds:
            query = query.where(table.c.event_kind.in_(request.kinds))
        if request.HasField("start_time"):
            query = query.where(table.c.event_time >= request.start_time.ToNanoseconds() / 1e9)
        if request.HasField("end_time"):
            query = query.where(table.c.event_time < request.end_time.ToNanoseconds() / 1e9)
        if request.page_token:
            last, _ = _cursor(request.page_token)
            query = query.where(table.c.sequence > last if request.oldest_first else table.c.sequence < last)
        order = table.c.sequence if request.oldest_first else table.c.sequence.desc()
        page_size = request.page_size or 100
        async with self.database.read() as connection:
            rows = await _all(connection, query.order_by(order).limit(page_size + 1))
        page, following = _page(rows, page_size, "sequence")
        return [HistoryEvent.FromString(row.payload) for row in page], following

    async def run_history_retention(self) -> None:
        """Drop from the feed what is older than its organization shows, for ever."""
        while True:
            await self.expire_history()
            await asyncio.sleep(_RETENTION_LOOK_SECONDS)

    async def expire_history(self) -> None:
        """Drop from the feed what is older than its organization shows."""
        async with self.database.read() as connection:
            found = await _all(connection, select(organizations.c.payload).where(organizations.c.deleted.is_(False)))
        for row in found:
            organization = Organization.FromString(row.payload)
            days = organization.settings.history_retention_days or _RETENTION_DAYS
            before = self.clock.seconds() - days * _DAY_SECONDS
            async with self.database.transaction() as tx:
                await self.index.forget(
                    tx, HISTORY, history_feed.c.scope == organization.id, history_feed.c.event_time < before
                )


def member_id(member: Member) -> str:
    """Return the id under which a membership is indexed."""
    return f"{member.organization_id}/{member.user_id}"


async def _one(reader: Reader, query: Select[Any]) -> Any:
    return (await reader.execute(query)).scalar_one_or_none()


async def _all(reader: Reader, query: Select[Any]) -> Sequence[Row[Any]]:
    return (await reader.execute(query)).all()


def _page(rows: Sequence[Row[Any]], page_size: int, column: str) -> tuple[Sequence[Row[Any]], str]:
    page = rows[:page_size]
    if len(rows) <= page_size:
        return page, ""
    last = page[-1]
    return page, page_token(json.dumps([getattr(last, column), last.id]))


def _cursor(token: str) -> tuple[Any, str]:
    try:
        value, last_id = json.loads(parse_page_token(token))
    except (ValueError, TypeError) as error:
        raise InvalidArgument("page_token", "is not one of ours", "PAGE_TOKEN_INVALID") from error
    return value, last_id
