"""Deletion of repositories and organizations: driven by rows, so that a stop at any point is gone on from."""

import hashlib
import uuid
from typing import Any

import pytest
from branchline.v1 import organizations_pb2, repositories_pb2
from branchline.v1.blobs_pb2 import CreateBlobRequest
from branchline.v1.common_pb2 import (
    ENTITY_KIND_ORGANIZATION,
    ENTITY_KIND_REPOSITORY,
    ENTITY_KIND_TASK,
    Prompt,
)
from branchline.v1.history_pb2 import EVENT_KIND_REPOSITORY_DELETED, EVENT_KIND_REPOSITORY_DELETING, HistoryEvent
from branchline.v1.organizations_pb2 import GithubStatus, Organization
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_MEMBER
from branchline.v1.users_pb2 import Draft, UserTaskState
from branchline.v1.watches_pb2 import CHANGE_TYPE_UPSERTED
from branchline_internal.github_data.v1.github_data_pb2 import DeleteOrganizationRequest, GithubRepository
from branchline_internal.history.v1.history_pb2 import DeleteFeedRequest
from branchline_internal.organization.v1.organization_pb2 import StoreBlobRequest
from branchline_internal.repository.v1.repository_pb2 import DeleteRepositoryRequest, EnsureRepositoryRequest
from branchline_internal.user.v1.user_pb2 import DraftState, ForgetTaskStatesRequest

from services.organization import repositories as repository_rules
from services.organization.destinations import TO_GITHUB_DATA, TO_HISTORY, TO_REPOSITORY, TO_USER
from services.organization.organizations import ORGANIZATIONS
from services.organization.repositories import REPOSITORIES
from services.runtime.errors import FailedPrecondition, PermissionDenied
from services.runtime.principal import bind_principal
from tests.support.databases import tamper_with
from tests.unit.organization.conftest import Room, call_as, open_room, summary

CONTEXT: Any = None
CHILDREN = [TO_GITHUB_DATA, TO_HISTORY, TO_USER]


async def delete_repository(room: Room, repository_id: str) -> None:
    request = repositories_pb2.DeleteRepositoryRequest(request_id=str(uuid.uuid4()), repository_id=repository_id)
    await room.repositories.DeleteRepository(request, CONTEXT)


async def delete_organization(room: Room, organization_id: str) -> None:
    request = organizations_pb2.DeleteOrganizationRequest(request_id=str(uuid.uuid4()), organization_id=organization_id)
    await room.organizations.DeleteOrganization(request, CONTEXT)


async def events(room: Room) -> list[int]:
    return [event.kind for event in await room.marks(TO_HISTORY, HistoryEvent)]


async def gone(room: Room, repository: Repository) -> None:
    """Have the repository say that it is gone."""
    repository.revision += 10
    assert not await room.push((repository, True))


async def test_a_repository_is_deleted_with_all_that_is_indexed_below_it(room: Room) -> None:  # ORG-9
    organization = await room.found()
    repository, other = await room.repository(organization.id), await room.repository(organization.id, "acme/other")
    await room.push(
        *((summary(organization.id, repository.id, number), False) for number in range(3)),
        (summary(organization.id, other.id, 9), False),
        (GithubRepository(organization_id=organization.id, github_id=7, clone_url=repository.remote_url), False),
    )
    call_as("usr_owner", organization.id)

    await delete_repository(room, repository.id)
    held = await room.database.read(REPOSITORIES.get, repository.id)
    await gone(room, held)

    assert held.HasField("delete_time")
    assert await room.marks(TO_REPOSITORY, DeleteRepositoryRequest) == [
        DeleteRepositoryRequest(repository_id=repository.id)
    ]
    assert await room.database.read(REPOSITORIES.find, repository.id) is None
    routes = [await room.database.read(room.stores.tasks.route, f"task_{number:06}") for number in (0, 1, 2, 9)]
    assert routes == [None, None, None, (organization.id, other.id)]
    assert room.count("github_repositories") == 0
    assert room.count("repository_deletions") == 0
    assert [kind for kind in await events(room) if kind in (8, 9)] == [
        EVENT_KIND_REPOSITORY_DELETING,
        EVENT_KIND_REPOSITORY_DELETED,
    ]
    forgotten = await room.marks(TO_USER, ForgetTaskStatesRequest)
    assert {one.task_id for one in forgotten} == {"task_000000", "task_000001", "task_000002"}


async def test_what_a_repository_says_meanwhile_does_not_make_it_live(room: Room) -> None:
    organization = await room.found()
    repository = await room.repository(organization.id)
    await delete_repository(room, repository.id)

    repository.revision, repository.live_task_count = 50, 3
    await room.push((repository, False))
    await room.push(
        (GithubRepository(organization_id=organization.id, github_id=7, clone_url=repository.remote_url), False)
    )

    held = await room.database.read(REPOSITORIES.get, repository.id)
    assert held.live_task_count == 3
    assert held.HasField("delete_time")
    assert not [one for one in await room.marks(TO_REPOSITORY, EnsureRepositoryRequest) if one.github]


async def test_a_repository_that_is_gone_twice_is_told_of_once(room: Room) -> None:
    organization = await room.found()
    repository = await room.repository(organization.id)

    await gone(room, repository)
    await gone(room, repository)

    assert (await events(room)).count(EVENT_KIND_REPOSITORY_DELETED) == 1
    assert room.count("repository_deletions") == 0


async def test_a_repository_with_many_tasks_is_buried_in_steps(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository_rules, "BURIED_AT_ONCE", 10)
    organization = await room.found()
    repository = await room.repository(organization.id)
    await room.push(*((summary(organization.id, repository.id, number), False) for number in range(35)))

    await gone(room, repository)
    after_one_step = room.count("task_summaries WHERE NOT deleted")
    await room.stores.teardown.sweep(room.database)

    assert after_one_step == 25
    assert room.count("task_summaries WHERE NOT deleted") == 0
    assert await room.database.read(REPOSITORIES.find, repository.id) is None


async def test_an_organization_that_cannot_end_holds_up_no_other(room: Room) -> None:
    doomed = [await room.found(slug) for slug in ("first", "second")]
    for organization in doomed:
        call_as("usr_owner", organization.id)
        await delete_organization(room, organization.id)
    bind_principal(None)
    tamper_with(room.url, "UPDATE teardowns SET done = true")  # as if every child had forgotten them
    tamper_with(room.url, "UPDATE organizations SET payload = :bad WHERE id = :id", bad=b"\xff", id=doomed[0].id)

    await room.stores.teardown.sweep(room.database)

    assert await room.database.read(ORGANIZATIONS.find, doomed[1].id) is None


async def test_what_is_being_deleted_takes_no_commands(room: Room) -> None:  # ORG-9
    organization = await room.found()
    await room.repository(organization.id)
    await delete_organization(room, organization.id)

    for attempt in (
        room.organizations.UpdateOrganization(
            organizations_pb2.UpdateOrganizationRequest(organization=Organization(id=organization.id)), CONTEXT
        ),
        room.organizations.InviteMember(
            organizations_pb2.InviteMemberRequest(organization_id=organization.id, role=ROLE_MEMBER), CONTEXT
        ),
        room.blobs.CreateBlob(CreateBlobRequest(organization_id=organization.id, size_bytes=1), CONTEXT),
        room.internal.StoreBlob(
            StoreBlobRequest(organization_id=organization.id, task_id="t", size_bytes=1, data=b"x"), CONTEXT
        ),
        room.repositories.CreateRepository(
            repositories_pb2.CreateRepositoryRequest(
                request_id="3", organization_id=organization.id, remote_url="https://git.test/x/y"
            ),
            CONTEXT,
        ),
        delete_organization(room, organization.id),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            await attempt
        assert refused.value.reason == "BEING_DELETED"


async def test_only_an_owner_deletes_an_organization_and_only_an_administrator_a_repository(room: Room) -> None:
    organization = await room.found()
    repository = await room.repository(organization.id)

    call_as("usr_a", organization.id, ROLE_ADMIN)
    with pytest.raises(PermissionDenied):
        await delete_organization(room, organization.id)
    call_as("usr_m", organization.id, ROLE_MEMBER)
    with pytest.raises(PermissionDenied):
        await delete_repository(room, repository.id)


async def _organization_to_end(room: Room) -> tuple[str, list[str]]:
    organization = await room.found("doomed")
    ids = [(await room.repository(organization.id, f"acme/{name}")).id for name in ("a", "b")]
    event = HistoryEvent(id="evt_1", organization_id=organization.id, sequence=1)
    state = UserTaskState(user_id="usr_owner", organization_id=organization.id, task_id="task_1", revision=1)
    await room.push(
        (summary(organization.id, ids[0], 1), False),
        (event, False),
        (state, False),
        (GithubStatus(organization_id=organization.id, revision=1), False),
    )
    await room.join(organization.id, "usr_2", ROLE_MEMBER)
    invite = organizations_pb2.InviteMemberRequest(organization_id=organization.id, role=ROLE_MEMBER)
    await room.organizations.InviteMember(invite, CONTEXT)
    draft = Draft(task_id="task_000001", prompt=Prompt(text="half written"), revision=1)
    await room.push_draft(DraftState(user_id="usr_owner", organization_id=organization.id, draft=draft))
    shown = StoreBlobRequest(
        organization_id=organization.id,
        task_id="task_000001",
        size_bytes=9,
        sha256=hashlib.sha256(b"an output").hexdigest(),
        data=b"an output",
    )
    await room.internal.StoreBlob(shown, CONTEXT)
    return organization.id, ids


async def _step(room: Room, organization_id: str, step: str) -> None:
    """Do what a child does: a repository is gone, or one of the others has forgotten."""
    if step in CHILDREN:
        await room.stores.teardown.forgotten(room.database, organization_id, step)
    else:
        await gone(room, await room.database.read(REPOSITORIES.get, step))


@pytest.mark.parametrize("stop_before", [None, 0, 1, 2, 3, 4])
async def test_an_organization_is_torn_down_whenever_the_service_stops(room: Room, stop_before: int | None) -> None:
    """ORG-9: repositories, then the other children, then the organization's own rows; the slug is free."""
    organization_id, ids = await _organization_to_end(room)
    bystander = await room.found("bystander")
    kept = await room.repository(bystander.id, "by/stander")
    call_as("usr_owner", organization_id)
    await delete_organization(room, organization_id)
    bind_principal(None)
    current, told = room, list[bool]()
    opened: list[Room] = []

    for number, step in enumerate([*ids, *CHILDREN]):
        if number == stop_before:  # nothing is left but the file; the sweep is what a start does
            current = await open_room(room.url, room.folder)
            opened.append(current)
            await current.stores.teardown.sweep(current.database)
        told.append(bool(await current.marks(TO_HISTORY, DeleteFeedRequest)))
        await _step(current, organization_id, step)

    asked = await current.marks(TO_REPOSITORY, DeleteRepositoryRequest)
    assert {one.repository_id for one in asked} == set(ids)
    assert told == [False, False, True, True, True]
    assert await current.marks(TO_GITHUB_DATA, DeleteOrganizationRequest)
    assert await current.database.read(ORGANIZATIONS.find, organization_id) is None
    assert await current.member_ids(organization_id) == set()
    assert current.count("teardowns") == current.count("repository_deletions") == 0
    assert current.count(f"history_feed WHERE scope = '{organization_id}'") == 0
    assert current.count(f"user_task_states WHERE scope = '{organization_id}'") == 0
    assert current.count("invitations") == current.count("drafts") == current.count("blob_claims") == 0
    await current.uploads.collect()
    assert current.count("blobs") == current.count("blob_usage") == current.count("blob_releases") == 0
    assert list((current.folder / "blobs").iterdir()) == []
    assert await current.database.read(current.stores.organizations.of_slug, "doomed") is None
    assert (await current.found("doomed")).id != organization_id
    assert await current.database.read(REPOSITORIES.get, kept.id)
    for room in opened:
        await room.database.close()


async def test_watchers_see_the_organization_go(room: Room) -> None:
    organization_id, ids = await _organization_to_end(room)
    kinds = [ENTITY_KIND_ORGANIZATION, ENTITY_KIND_REPOSITORY, ENTITY_KIND_TASK]
    (page,) = [one async for one in room.stores.index.catch_up(organization_id, kinds, None, "*", tail=True)]
    call_as("usr_owner", organization_id)
    await delete_organization(room, organization_id)
    for step in [*ids, *CHILDREN]:
        await _step(room, organization_id, step)

    # what was purged without tombstones raises the horizon: a watcher from before begins again
    pages = [one async for one in room.stores.index.catch_up(organization_id, kinds, page.position, "*")]

    assert pages[-1].position is not None
    held = {change.id for one in pages for change in one.changes if change.type == CHANGE_TYPE_UPSERTED}
    assert held == set()


async def test_what_comes_late_for_an_organization_that_is_gone_is_forgotten(room: Room) -> None:
    event = HistoryEvent(id="evt_1", organization_id="org_gone", sequence=1)
    new = HistoryEvent(id="evt_2", organization_id="org_gone")

    refused = await room.push(
        (event, False),
        (new, False),
        (GithubRepository(organization_id="org_gone", github_id=1, clone_url="https://git.test/a/b"), False),
    )

    assert refused == {}
    assert await events(room) == []
    assert room.count("history_feed") == room.count("repositories") == 0
