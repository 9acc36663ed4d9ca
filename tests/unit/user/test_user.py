"""People and what they have open: one person per address, bounded drafts, revisions that only grow."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from branchline.v1 import users_pb2
from branchline.v1.sessions_pb2 import Attachment
from branchline.v1.users_pb2 import Draft, User, UserTaskState
from branchline_internal.user.v1 import user_pb2
from cryptography.fernet import Fernet
from google.protobuf.message import Message
from sqlalchemy import bindparam, select

from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, open_database
from services.runtime.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from services.runtime.principal import Principal, bind_principal
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.runtime.spine.tables import outbox
from services.user.accounts import Accounts
from services.user.cipher import Cipher
from services.user.public import PublicUserServicer
from services.user.servicer import UserServicer
from services.user.tables import applied_events
from services.user.task_states import DRAFT_BYTES, KEEP_SECONDS, SESSIONS_PER_TASK, TaskStates
from tests.support.databases import migrated

CONTEXT: Any = None
_MARKS = Statement(select(outbox).where(outbox.c.destination == bindparam("to")).order_by(outbox.c.seq))
_APPLIED = Statement(select(applied_events.c.event_id))


class Later(Clock):
    """A clock that is ahead."""

    def seconds(self) -> float:
        return super().seconds() + KEEP_SECONDS + 60


@dataclass
class Room:
    database: Database
    task_states: TaskStates
    internal: UserServicer
    public: PublicUserServicer

    async def create(self, user_id: str, email: str = "", token_name: str = "") -> user_pb2.CreateUserResponse:
        request = user_pb2.CreateUserRequest(user_id=user_id, display_name=user_id, email=email, token_name=token_name)
        return await self.internal.CreateUser(request, CONTEXT)

    async def set_state(self, session_id: str = "", **fields: Any) -> UserTaskState:
        request = users_pb2.SetTaskStateRequest(task_id="task_1", session_id=session_id, **fields)
        return (await self.public.SetTaskState(request, CONTEXT)).state

    async def forget(self, **fields: str) -> None:
        await self.internal.ForgetTaskStates(user_pb2.ForgetTaskStatesRequest(**fields), CONTEXT)

    async def unread(self, event_id: str, *user_ids: str) -> None:
        request = user_pb2.MarkUnreadRequest(
            organization_id="org_1", user_ids=user_ids, task_id="task_1", event_id=event_id
        )
        await self.internal.MarkUnread(request, CONTEXT)

    async def pushed(self, kind: type[Message]) -> dict[str, Any]:
        """Return what waits to be pushed, by id."""
        rows = await self.database.read(lambda tx: tx.rows(_MARKS, {"to": COORDINATOR}))
        name = kind.DESCRIPTOR.full_name
        return {row.entity_id: row for row in rows if row.type_url.endswith(f"/{name}")}


@pytest.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    database, clock = open_database(migrated("user", tmp_path)), Clock()
    await database.start()
    box = Outbox(database, clock)
    accounts, states = Accounts(box, clock, Cipher(Fernet.generate_key().decode())), TaskStates(box, clock)
    public = PublicUserServicer(database, Commands(database, clock), accounts, states)
    bind_principal(Principal(user_id="usr_1", organization_id="org_1"))
    yield Room(database, states, UserServicer(database, accounts, states), public)
    await database.close()
    bind_principal(None)


async def test_one_address_is_one_person_however_many_ask_at_once(room: Room) -> None:  # F11, F26
    answers = await asyncio.gather(*(room.create(f"usr_{n}", "A@Example.com ", "first") for n in range(8)))

    assert len({answer.user.id for answer in answers}) == 1
    assert len(await room.pushed(User)) == 1
    assert sum(bool(answer.api_token) for answer in answers) == 1
    assert len(await room.pushed(user_pb2.ApiTokenState)) == 1


async def test_a_person_is_made_without_a_token_unless_one_is_asked_for(room: Room) -> None:  # F32
    answer = await room.create("usr_9", "nine@example.com")

    assert answer.api_token == ""
    assert await room.pushed(user_pb2.ApiTokenState) == {}


async def test_a_token_for_another_is_issued_to_services_alone(room: Room) -> None:  # F32
    await room.create("usr_9")
    request = user_pb2.IssueTokenRequest(user_id="usr_9", name="first")
    with pytest.raises(PermissionDenied):
        await room.internal.IssueToken(request, CONTEXT)
    bind_principal(Principal(service="organization"))

    issued = await room.internal.IssueToken(request, CONTEXT)
    with pytest.raises(NotFound):
        await room.internal.IssueToken(user_pb2.IssueTokenRequest(user_id="usr_0", name="x"), CONTEXT)

    assert issued.api_token.startswith("bl_")
    assert len(await room.pushed(user_pb2.ApiTokenState)) == 1


@pytest.mark.parametrize("shape", ["text", "attachments"])
async def test_a_draft_alone_is_bounded(room: Room, shape: str) -> None:  # F30
    draft = Draft(text="x" * DRAFT_BYTES)
    if shape == "attachments":
        draft = Draft(attachments=[Attachment(path=f"f{n}", content="y" * 16_384) for n in range(4)])

    with pytest.raises(InvalidArgument, match="draft"):
        await room.set_state(draft=draft)


async def test_drafts_on_one_task_are_bounded_together(room: Room) -> None:  # F30, F22
    half = Draft(text="x" * (DRAFT_BYTES // 2 - 100))
    await room.set_state("ses_1", draft=half)
    await room.set_state("ses_2", draft=half)

    with pytest.raises(ResourceExhausted) as refused:
        await room.set_state("ses_3", draft=Draft(text="y" * 200))
    await room.set_state("ses_1", draft=Draft())
    await room.set_state("ses_3", draft=Draft(text="y" * 200))
    await room.set_state("ses_3", unread=True)

    assert (refused.value.reason, refused.value.metadata["limit_bytes"]) == ("QUOTA_EXCEEDED", str(DRAFT_BYTES))


async def test_states_of_one_task_are_bounded_in_number(room: Room) -> None:  # F30
    for number in range(SESSIONS_PER_TASK):
        await room.set_state(f"ses_{number}", unread=True)

    with pytest.raises(InvalidArgument, match="session_id"):
        await room.set_state("ses_more", unread=True)
    await room.set_state("ses_0", unread=False)


async def test_states_are_forgotten_with_member_task_or_organization(room: Room) -> None:  # ORG-9
    await room.set_state(draft=Draft(text="secret"))
    bind_principal(Principal(user_id="usr_2", organization_id="org_1"))
    await room.set_state(open_session_id="ses_1")
    bind_principal(Principal(user_id="usr_1", organization_id="org_2"))
    await room.public.SetTaskState(users_pb2.SetTaskStateRequest(task_id="task_9", unread=True), CONTEXT)

    async def deleted() -> set[str]:
        return {name for name, row in (await room.pushed(UserTaskState)).items() if row.deleted}

    await room.forget(organization_id="org_1", user_id="usr_1")
    of_member = await deleted()
    await room.forget(organization_id="org_1", task_id="task_1")
    of_task = await deleted()
    await room.forget(organization_id="org_2")

    assert of_member == {"usr_1/task_1/"}
    assert of_task == {"usr_1/task_1/", "usr_2/task_1/"}
    assert len(await deleted()) == 3
    assert b"secret" not in (await room.pushed(UserTaskState))["usr_1/task_1/"].payload


async def test_revisions_go_on_where_a_state_was_forgotten(room: Room) -> None:
    """An index that holds the tombstone would ignore a state that began again at one."""
    await room.set_state(unread=True)
    await room.set_state(draft=Draft(text="old"))
    await room.forget(organization_id="org_1")

    again = await room.set_state(unread=True)

    assert again.revision == 4
    assert not again.HasField("draft")
    assert not (await room.pushed(UserTaskState))["usr_1/task_1/"].deleted


async def test_many_states_are_forgotten_in_bounded_steps(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [f"usr_{n}" for n in range(1200)]
    await room.unread("evt_1", *users)
    commits = room.database.commits

    await room.forget(organization_id="org_1")

    assert room.database.commits - commits >= 3
    assert all(row.deleted for row in (await room.pushed(UserTaskState)).values())


async def test_an_event_marks_unread_once_with_a_handful_of_statements(room: Room) -> None:  # USR-6
    await room.unread("evt_1", "usr_1")
    await room.set_state(unread=False)
    await room.unread("evt_1", "usr_1")
    seen = await room.set_state(open_session_id="s")
    before = room.database.statements

    await room.unread("evt_2", *(f"usr_{n}" for n in range(300)))

    assert not seen.unread
    assert room.database.statements - before <= 4


async def test_applied_events_and_forgotten_states_are_pruned_after_a_week(room: Room) -> None:  # F17
    await room.unread("evt_1", "usr_1")
    await room.set_state()
    await room.database.write(room.task_states.prune)
    kept = await room.database.read(lambda tx: len(tx.rows(_APPLIED)))
    later = TaskStates(room.task_states.outbox, Later())

    await room.database.write(later.prune)

    assert kept == 1
    assert await room.database.read(lambda tx: len(tx.rows(_APPLIED))) == 0
    assert (await room.set_state(unread=True)).revision > 2, "a state that lives is kept"


async def test_preferences_are_changed_once_for_one_request(room: Room) -> None:  # F11
    await room.create("usr_1")
    request = users_pb2.UpdatePreferencesRequest(request_id="r")
    request.preferences.default_agent = "mock"

    answers = await asyncio.gather(*(room.public.UpdatePreferences(request, CONTEXT) for _ in range(4)))

    assert all(answer == answers[0] for answer in answers)
    assert answers[0].user.revision == 2


async def test_credentials_come_back_and_go(room: Room) -> None:
    set_it = users_pb2.SetGitCredentialRequest(host="Git.Test", username="me", secret="s3")
    ask = user_pb2.GetGitCredentialRequest(user_id="usr_1", host="git.test")

    await room.public.SetGitCredential(set_it, CONTEXT)
    held = await room.internal.GetGitCredential(ask, CONTEXT)
    set_it.secret = ""
    await room.public.SetGitCredential(set_it, CONTEXT)

    assert (held.username, held.secret) == ("me", "s3")
    assert (await room.internal.GetGitCredential(ask, CONTEXT)).username == ""
