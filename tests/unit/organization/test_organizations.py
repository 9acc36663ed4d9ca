"""Organizations: founded once, changed within bounds, bound to a GitHub login by the operator alone."""

import asyncio
import uuid
from typing import Any

import pytest
from branchline.v1 import organizations_pb2, repositories_pb2
from branchline.v1.common_pb2 import ENTITY_KIND_ORGANIZATION, Consistency
from branchline.v1.organizations_pb2 import ORGANIZATION_KIND_TEAM, Organization, OrganizationSettings
from branchline_internal.github_data.v1.github_data_pb2 import SyncOrganizationRequest
from branchline_internal.organization.v1 import organization_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from services.organization.destinations import TO_GITHUB_DATA
from services.runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from services.runtime.principal import OPERATOR, Principal, bind_principal
from services.runtime.spine.tokens import consistency_token
from tests.unit.organization.conftest import Calling, Room, call_as

CONTEXT: Any = None


async def bind(room: Room, slug: str, login: str) -> Organization:
    bind_principal(Principal(service=OPERATOR))
    request = organization_pb2.BindGithubLoginRequest(slug=slug, github_login=login)
    return (await room.internal.BindGithubLogin(request, CONTEXT)).organization


async def update(room: Room, given: Organization, *paths: str) -> Organization:
    request = organizations_pb2.UpdateOrganizationRequest(
        request_id=str(uuid.uuid4()),
        organization=given,
        update_mask=FieldMask(paths=paths),
    )
    return (await room.organizations.UpdateOrganization(request, CONTEXT)).organization


async def test_an_organization_is_created_once_however_often_it_is_asked_for(room: Room) -> None:  # F11, ORG-1
    await room.found("home")
    request = organizations_pb2.CreateOrganizationRequest(
        request_id="once", slug="acme", display_name="Acme", kind=ORGANIZATION_KIND_TEAM
    )

    answers = await asyncio.gather(*(room.organizations.CreateOrganization(request, CONTEXT) for _ in range(5)))
    answers.append(await room.organizations.CreateOrganization(request, CONTEXT))

    assert all(answer == answers[0] for answer in answers)
    request.request_id = "twice"
    with pytest.raises(AlreadyExists) as refused:
        await room.organizations.CreateOrganization(request, CONTEXT)
    assert refused.value.reason == "SLUG_TAKEN"


@pytest.mark.parametrize("path", ["github_login", "github_account_id", "id", "revision", "delete_time", "nonsense"])
async def test_what_is_not_the_administrators_cannot_be_changed(room: Room, path: str) -> None:  # F15
    organization = await room.found()
    organization.github_login = "stolen"

    with pytest.raises(InvalidArgument):
        await update(room, organization, path)


async def test_a_login_is_bound_by_the_operator_and_is_nobody_elses_then(room: Room) -> None:  # F15
    acme, other = await room.found("acme"), await room.found("other")

    bound = await bind(room, "acme", "OctoCat")
    with pytest.raises(AlreadyExists) as refused:
        await bind(room, "other", "octocat")
    await bind(room, "acme", "")
    again = await bind(room, "other", "octocat")

    assert (bound.id, bound.github_login) == (acme.id, "OctoCat")
    assert refused.value.reason == "GITHUB_LOGIN_TAKEN"
    assert (again.id, again.github_login) == (other.id, "octocat")


async def test_no_role_of_an_organization_binds_a_login_or_issues_a_token(room: Room) -> None:  # F15, F32
    organization = await room.found()
    call_as("usr_owner", organization.id)

    with pytest.raises(PermissionDenied):
        await room.internal.BindGithubLogin(
            organization_pb2.BindGithubLoginRequest(slug="acme", github_login="octocat"), CONTEXT
        )
    with pytest.raises(PermissionDenied):
        await room.internal.IssueToken(
            organization_pb2.IssueTokenRequest(email="usr_owner@example.com", name="mine"), CONTEXT
        )


async def test_a_sync_is_asked_for_once_and_needs_a_login(room: Room) -> None:  # F11
    organization = await room.found()
    request = repositories_pb2.SyncGithubRequest(request_id="s", organization_id=organization.id)
    with pytest.raises(FailedPrecondition) as refused:
        await room.repositories.SyncGithub(request, CONTEXT)
    await bind(room, "acme", "octocat")
    call_as("usr_owner", organization.id)

    await asyncio.gather(*(room.repositories.SyncGithub(request, CONTEXT) for _ in range(3)))

    assert refused.value.reason == "GITHUB_NOT_CONNECTED"
    assert len(await room.marks(TO_GITHUB_DATA, SyncOrganizationRequest)) == 1


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("slug", Organization(slug="Not A Slug")),
        ("display_name", Organization(display_name="x" * 129)),
        ("display_name", Organization()),
        ("settings", Organization(settings=OrganizationSettings(default_model="x" * 100_000))),
    ],
)
async def test_a_profile_is_held_within_bounds(room: Room, path: str, given: Organization) -> None:  # F30
    organization = await room.found()
    given.id = organization.id

    with pytest.raises(InvalidArgument):
        await update(room, given, path)


async def test_a_token_about_another_tenants_entities_tells_nothing(room: Room) -> None:  # F31
    secret, mine = await room.found("secret", owner="usr_s"), await room.found("mine")
    tokens = [
        consistency_token([(ENTITY_KIND_ORGANIZATION, one, revision)])
        for one, revision in ((secret.id, 1), (secret.id, 10**6), ("org_never", 1))
    ]
    context: Any = Calling()
    said: list[str] = []

    for token in tokens:
        request = organizations_pb2.GetOrganizationRequest(
            organization_id=mine.id,
            consistency=Consistency(at_least_as_fresh=[token], max_wait=Duration(nanos=50_000_000)),
        )
        with pytest.raises(Unavailable) as refused:
            await room.organizations.GetOrganization(request, context)
        said.append(refused.value.message)

    assert len(set(said)) == 1
