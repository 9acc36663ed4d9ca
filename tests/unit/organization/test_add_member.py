"""Members are added with the real user service behind: one person per address, no token, no orphan."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from branchline.v1 import organizations_pb2 as api
from branchline.v1.organizations_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_OWNER, ROLE_VIEWER, Role
from branchline.v1.organizations_pb2_grpc import OrganizationServiceStub as PublicStub
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.user.v1.user_pb2 import CreateUserRequest
from branchline_internal.user.v1.user_pb2_grpc import UserServiceStub

from services.organization.service import OrganizationConfig
from services.organization.service import build as build_organization
from services.runtime.client import SigningChannel, open_channel
from services.runtime.config import Secret
from services.runtime.principal import OPERATOR, Principal, Signer, bind_principal
from services.runtime.secrets import token_hash
from services.user.service import UserConfig
from services.user.service import build as build_user
from tests.support.databases import migrated

NAMES = ("organization", "user", "repository", "history", "github_data")


@dataclass
class Pair:
    """Organization and user, running. Their neighbours are away."""

    channels: dict[str, SigningChannel]
    organization_id: str
    owner_id: str
    token: str

    @property
    def public(self) -> PublicStub:
        return PublicStub(self.channels["organization"])  # type: ignore[arg-type]

    @property
    def internal(self) -> OrganizationServiceStub:
        return OrganizationServiceStub(self.channels["organization"])  # type: ignore[arg-type]

    @property
    def user(self) -> UserServiceStub:
        return UserServiceStub(self.channels["user"])  # type: ignore[arg-type]

    async def add(self, email: str, role: Role.ValueType = ROLE_MEMBER, request_id: str = "") -> api.AddMemberResponse:
        request = api.AddMemberRequest(
            request_id=request_id or uuid.uuid4().hex,
            organization_id=self.organization_id,
            email=email,
            display_name="New",
            role=role,
        )
        return await self.public.AddMember(request, wait_for_ready=True)

    async def holder(self, email: str) -> str:
        """Return the person of an address; makes one if nobody has it."""
        request = CreateUserRequest(user_id=f"usr_{uuid.uuid4().hex}", display_name="Probe", email=email)
        return (await self.user.CreateUser(request, wait_for_ready=True)).user.id

    def call_as_owner(self) -> None:
        bind_principal(Principal(user_id=self.owner_id, organization_id=self.organization_id, role=ROLE_OWNER))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncGenerator[Pair, None]:
    addresses = {name: f"unix:{tmp_path / name[:4]}" for name in NAMES}
    shared = {"addresses": addresses, "signing_key": Secret("k" * 32), "drain_seconds": 0.1}
    migrated("user", tmp_path / "u")
    migrated("organization", tmp_path / "o")
    user = build_user(UserConfig(data_dir=tmp_path / "u", **shared))  # type: ignore[arg-type]
    organization = build_organization(OrganizationConfig(data_dir=tmp_path / "o", **shared))  # type: ignore[arg-type]
    signer = Signer("k" * 32, OPERATOR)
    channels = {name: open_channel(addresses[name], signer) for name in ("organization", "user")}
    async with organization.running(), user.running():
        stub = OrganizationServiceStub(channels["organization"])  # type: ignore[arg-type]
        request = organization_pb2.BootstrapRequest(
            slug="home", organization_name="Home", user_name="First", user_email="first@example.com"
        )
        answer = await stub.Bootstrap(request, wait_for_ready=True)
        said = await stub.Authenticate(organization_pb2.AuthenticateRequest(token_hash=token_hash(answer.api_token)))
        opened = Pair(channels, answer.organization.id, said.user.id, answer.api_token)
        opened.call_as_owner()
        yield opened
        for channel in channels.values():
            await channel.close()
    bind_principal(None)


async def test_members_are_added_once_and_by_one_address(pair: Pair) -> None:
    """F11, F26, F32, in one installation: the same request at once, other requests at once, refusals, the token."""
    same = await asyncio.gather(*(pair.add("same@example.com", request_id="once") for _ in range(4)))
    again = await pair.add("same@example.com", request_id="once")
    others = await asyncio.gather(*(pair.add("Other@example.com") for _ in range(4)), return_exceptions=True)

    assert all(answer == again for answer in same)
    joined = [answer for answer in others if isinstance(answer, api.AddMemberResponse)]
    refused = [answer for answer in others if isinstance(answer, grpc.aio.AioRpcError)]
    assert (len(joined), {error.code() for error in refused}) == (1, {grpc.StatusCode.ALREADY_EXISTS})
    assert await pair.holder("same@example.com") == again.member.user_id
    assert await pair.holder("other@example.com") == joined[0].member.user_id
    assert "api_token" not in api.AddMemberResponse.DESCRIPTOR.fields_by_name

    bind_principal(Principal(service=OPERATOR))
    issue = organization_pb2.IssueTokenRequest(email="Same@example.com", name="first")
    issued = await pair.internal.IssueToken(issue)
    hashed = token_hash(issued.api_token)
    said = await pair.internal.Authenticate(organization_pb2.AuthenticateRequest(token_hash=hashed))
    assert said.user.id == again.member.user_id
    assert [member.role for member in said.memberships] == [ROLE_MEMBER]


async def test_nobody_is_created_for_a_command_that_is_refused(pair: Pair) -> None:  # F11
    bind_principal(Principal(user_id="usr_x", organization_id=pair.organization_id, role=ROLE_VIEWER))
    with pytest.raises(grpc.aio.AioRpcError) as denied:
        await pair.add("viewer@example.com")
    bind_principal(Principal(user_id="usr_y", organization_id=pair.organization_id, role=ROLE_ADMIN))
    with pytest.raises(grpc.aio.AioRpcError) as no_owner:
        await pair.add("owner@example.com", ROLE_OWNER)
    bind_principal(Principal(service=OPERATOR))

    for error in (denied, no_owner):
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
    for email in ("viewer@example.com", "owner@example.com"):
        request = organization_pb2.IssueTokenRequest(email=email, name="first")
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await pair.internal.IssueToken(request)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_bootstrap_is_done_once_and_its_token_works(pair: Pair) -> None:
    bind_principal(Principal(service=OPERATOR))
    request = organization_pb2.BootstrapRequest(
        slug="home", organization_name="Home", user_name="First", user_email="first@example.com"
    )

    again = await pair.internal.Bootstrap(request)

    assert (again.organization.id, again.api_token) == (pair.organization_id, "")
    hashed = token_hash(pair.token)
    said = await pair.internal.Authenticate(organization_pb2.AuthenticateRequest(token_hash=hashed))
    assert [member.role for member in said.memberships] == [ROLE_OWNER]
