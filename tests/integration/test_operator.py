"""What the installation's operator sees and does, and that nobody else can."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from branchline.v1 import roles_pb2, users_pb2
from branchline.v1.history_pb2 import HistoryEvent
from branchline_internal.admin.v1 import admin_pb2
from branchline_internal.admin.v1.admin_pb2_grpc import AdminServiceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.installation import ROOT, Installation, local_installation
from cli.settings import Settings
from services.runtime.config import ServiceConfig
from services.runtime.errors import InvalidArgument
from services.runtime.principal import Principal, Signer
from services.runtime.service import OUTBOX_PART, Chassis
from services.runtime.spine.outbox import Mark, OutboxRow
from tests.integration.test_command_line import BIN, branchline, run
from tests.support.client import Client
from tests.support.databases import installed
from tests.support.stack import Stack, eventually, failure

CHILD = "child"


class Parking:
    """A service whose courier cannot deliver until it is mended."""

    def __init__(self, installation: Installation) -> None:
        config = ServiceConfig(
            addresses=installation.addresses,
            data_dir=installation.settings.data_dir.absolute() / "history",
            database_url=installation.settings.databases.history,
            signing_key=installation.signing_key,
        )
        self.chassis = Chassis("history", config, ROOT / "services" / "history", callers=())
        self.chassis.courier(CHILD, self._deliver)
        self.broken = True
        self.delivered: list[str] = []

    async def _deliver(self, row: OutboxRow) -> None:
        if self.broken:
            raise InvalidArgument("event", "cannot be taken")
        self.delivered.append(row.entity_id)

    async def mark(self, *ids: str) -> None:
        marks = [Mark(one, 1, HistoryEvent(id=one), destination=CHILD) for one in ids]
        await self.chassis.database.write(self.chassis.outbox.mark, marks)

    async def until_parked(self, count: int) -> None:
        async def parked() -> bool:
            return (await self.chassis.outbox.counts())[1] == count

        await eventually(parked)


@pytest_asyncio.fixture(loop_scope="session")
async def parking(tmp_path: Path) -> AsyncGenerator[tuple[Parking, Path], None]:
    """A service with a folder of its own, running."""
    installation = local_installation(Settings(data_dir=tmp_path / "data", databases=installed()))
    service = Parking(installation)
    async with service.chassis.service.running():
        yield service, tmp_path / "data"


async def outbox(data_dir: Path, *arguments: str) -> str:
    code, out, errors = await run(
        str(BIN / "branchline"), "outbox", *arguments, "--service", "history", "--data-dir", str(data_dir)
    )
    assert code == 0, errors
    return out


async def test_what_is_parked_is_listed_delivered_again_or_dropped(parking: tuple[Parking, Path]) -> None:  # item 5
    service, data_dir = parking
    await service.mark("evt_a", "evt_b")
    await service.until_parked(2)

    listed = [json.loads(line) for line in (await outbox(data_dir, "list", "--parked", "--json")).splitlines()]
    table = await outbox(data_dir, "list")
    dropped = await outbox(data_dir, "drop", listed[0]["seq"])
    service.broken = False
    retried = await outbox(data_dir, "retry")
    await eventually(lambda: asyncio.sleep(0, service.delivered == [listed[1]["entity_id"]]))

    assert {row["entity_id"] for row in listed} == {"evt_a", "evt_b"}
    assert all(row["service"] == "history" and "cannot be taken" in row["parked_reason"] for row in listed)
    assert "evt_a" in table
    assert dropped == "history: 1 forgotten\n"
    assert retried == "history: 1 to be delivered again\n"

    async def empty() -> bool:
        return await outbox(data_dir, "list") == "nothing waits\n"

    assert await eventually(empty)


async def test_what_is_parked_shows_in_the_health_check(parking: tuple[Parking, Path]) -> None:  # item 5
    service, _ = parking

    async def health() -> int:
        await service.chassis.tell_parked()
        async with grpc.aio.insecure_channel(
            service.chassis.config.addresses["history"], options=(("grpc.default_authority", "localhost"),)
        ) as channel:
            request = health_pb2.HealthCheckRequest(service=OUTBOX_PART)
            return (await health_pb2_grpc.HealthStub(channel).Check(request)).status

    well = await health()
    await service.mark("evt_a")
    await service.until_parked(1)

    assert well == health_pb2.HealthCheckResponse.SERVING
    assert await health() == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("role", [roles_pb2.ROLE_ADMIN, roles_pb2.ROLE_OWNER])
async def test_no_role_of_an_organization_opens_the_outbox(
    parking: tuple[Parking, Path], role: roles_pb2.Role.ValueType
) -> None:  # item 5
    service, _ = parking
    signer = Signer(service.chassis.config.signing_key.value, "gateway")
    metadata = signer.metadata("history", Principal(user_id="usr_1", organization_id="org_1", role=role))
    async with grpc.aio.insecure_channel(
        service.chassis.config.addresses["history"], options=(("grpc.default_authority", "localhost"),)
    ) as channel:
        refused = await failure(AdminServiceStub(channel).ListOutbox(admin_pb2.ListOutboxRequest(), metadata=metadata))

    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "OPERATOR_REQUIRED")


async def test_the_gateway_knows_no_way_to_the_outbox(stack: Stack) -> None:  # item 5
    refused = await failure(AdminServiceStub(stack.client.channel).ListOutbox(admin_pb2.ListOutboxRequest()))

    assert refused.code == grpc.StatusCode.UNIMPLEMENTED


async def test_who_accepts_an_invitation_is_told_the_first_token_and_nobody_else(stack: Stack) -> None:  # F32
    email = "new.person@example.com"
    _, invited, _ = await branchline(stack, "member", "invite", email, "--role", "viewer")
    code = invited.split()[-1]
    accept = ("member", "accept", code, "--name", "New Person")

    done, accepted, errors = await branchline(stack, *accept)
    again, _, refused = await branchline(stack, *accept)
    issued, issued_token, _ = await branchline(
        stack, "token", "issue", email, "--data-dir", str(stack.installation.settings.data_dir)
    )

    assert (done, again, issued) == (0, 1, 0), errors
    assert "bl_" not in invited
    assert "INVITATION_INVALID" in refused
    for token in (accepted.split()[-1], issued_token.strip()):
        async with Client(stack.address, token) as client:
            me = await client.users.GetCurrentUser(users_pb2.GetCurrentUserRequest())
        assert (me.user.email, me.user.display_name) == (email, "New Person")
        assert [one.role for one in me.memberships] == [roles_pb2.ROLE_VIEWER]


async def test_members_are_given_roles_and_removed(stack: Stack) -> None:  # ORG-3
    client, user_id = await stack.new_member()
    await client.close()

    promoted, _, errors = await branchline(stack, "member", "role", user_id, "admin")
    _, listed, _ = await branchline(stack, "member", "list")
    removed, _, _ = await branchline(stack, "member", "remove", user_id)
    _, after, _ = await branchline(stack, "member", "list")

    assert (promoted, removed) == (0, 0), errors
    assert f"{user_id}  admin" in listed
    assert user_id not in after


async def test_the_operator_binds_a_login_to_an_organization(stack: Stack) -> None:  # F15
    folder = str(stack.installation.settings.data_dir)

    code, out, errors = await branchline(stack, "github", "bind", "home", "octo", "--data-dir", folder)
    await branchline(stack, "github", "bind", "home", "", "--data-dir", folder)

    assert code == 0, errors
    assert out == "home is bound to octo\n"


async def test_nobody_else_on_the_host_reads_what_the_services_keep(stack: Stack) -> None:  # F14
    folders = [path for path in stack.installation.settings.data_dir.iterdir() if path.is_dir()]

    assert {"organization", "sandbox", "user"} <= {path.name for path in folders}
    assert not [path for path in folders if path.stat().st_mode & 0o077]
