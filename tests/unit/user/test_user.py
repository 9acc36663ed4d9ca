"""People and what they have open: one person per address, bounded drafts, revisions that only grow."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from branchline.v1 import users_pb2
from branchline.v1.common_pb2 import Attachment, FileExcerpt, Prompt
from branchline.v1.secrets_pb2 import (
    CreateSecretRequest,
    DeleteSecretRequest,
    GitCredential,
    Secret,
    UpdateSecretRequest,
)
from branchline.v1.users_pb2 import Draft, User, UserTaskState
from branchline_internal.user.v1 import user_pb2
from cryptography.fernet import Fernet
from google.protobuf import any_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from sqlalchemy import bindparam, select

from services.runtime.clock import Clock
from services.runtime.database import Database, Statement, open_database
from services.runtime.errors import (
    Aborted,
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from services.runtime.principal import Principal, bind_principal
from services.runtime.secrets import token_hash
from services.runtime.spine.commands import Commands
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.runtime.spine.tables import outbox, requests
from services.user.accounts import Accounts
from services.user.cipher import Cipher
from services.user.drafts import DRAFT_BYTES, Drafts
from services.user.keeping import Secrets
from services.user.public import PublicSecretServicer, PublicUserServicer
from services.user.servicer import UserServicer
from services.user.tables import applied_events, drafts, secrets
from services.user.task_states import KEEP_SECONDS, SESSIONS_PER_TASK, TaskStates
from tests.support.databases import migrated

CONTEXT: Any = None
_MARKS = Statement(select(outbox).where(outbox.c.destination == bindparam("to")).order_by(outbox.c.seq))
_ALL_MARKS = Statement(select(outbox))
_DRAFTS = Statement(select(drafts))
_SECRETS = Statement(select(secrets))
_REMEMBERED = Statement(select(requests))
_APPLIED = Statement(select(applied_events.c.event_id))


class Later(Clock):
    """A clock that is ahead."""

    def seconds(self) -> float:
        return super().seconds() + KEEP_SECONDS + 60


@dataclass
class Room:
    database: Database
    task_states: TaskStates
    drafts: Drafts
    internal: UserServicer
    public: PublicUserServicer
    secrets: PublicSecretServicer

    async def create(self, user_id: str, email: str = "", token: str = "") -> user_pb2.CreateUserResponse:
        request = user_pb2.CreateUserRequest(
            user_id=user_id,
            display_name=user_id,
            email=email,
            token_hash=token_hash(token) if token else "",
            token_name="first",
        )
        return await self.internal.CreateUser(request, CONTEXT)

    async def set_state(self, session_id: str = "", **fields: Any) -> UserTaskState:
        given = UserTaskState(task_id=fields.pop("task_id", "task_1"), session_id=session_id, **fields)
        mask = FieldMask(paths=list(fields))
        request = users_pb2.UpdateUserTaskStateRequest(user_task_state=given, update_mask=mask)
        return (await self.public.UpdateUserTaskState(request, CONTEXT)).user_task_state

    async def write(self, prompt: Prompt, session_id: str = "", task_id: str = "task_1") -> Draft:
        """Keep a draft."""
        draft = Draft(task_id=task_id, session_id=session_id, prompt=prompt)
        return (await self.public.UpdateDraft(users_pb2.UpdateDraftRequest(draft=draft), CONTEXT)).draft

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
    accounts, states, drafts = Accounts(box, clock), TaskStates(box, clock), Drafts(box, clock)
    secrets, commands = Secrets(box, clock, Cipher(Fernet.generate_key().decode())), Commands(database, clock)
    bind_principal(Principal(user_id="usr_1", organization_id="org_1"))
    yield Room(
        database,
        states,
        drafts,
        UserServicer(database, accounts, states, drafts, secrets),
        PublicUserServicer(commands, accounts, states, drafts),
        PublicSecretServicer(commands, secrets),
    )
    await database.close()
    bind_principal(None)


async def test_one_address_is_one_person_however_many_ask_at_once(room: Room) -> None:  # F11, F26
    answers = await asyncio.gather(*(room.create(f"usr_{n}", "A@Example.com ", f"token {n}") for n in range(8)))

    assert len({answer.user.id for answer in answers}) == 1
    assert len(await room.pushed(User)) == 1
    assert len(await room.pushed(user_pb2.ApiTokenState)) == 1


async def test_a_person_is_made_without_a_token_unless_one_is_asked_for(room: Room) -> None:  # F32
    await room.create("usr_9", "nine@example.com")

    assert await room.pushed(user_pb2.ApiTokenState) == {}


async def test_a_first_token_is_made_once_however_often_it_is_asked_for(room: Room) -> None:
    for token in ("first", "first", "other"):
        await room.create("usr_9", "nine@example.com", token)

    rows = (await room.pushed(user_pb2.ApiTokenState)).values()
    hashes = {user_pb2.ApiTokenState.FromString(row.payload).token_hash for row in rows}
    assert hashes == {token_hash("first"), token_hash("other")}


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
    prompt = Prompt(text="x" * DRAFT_BYTES)
    if shape == "attachments":
        excerpts = [FileExcerpt(path=f"f{n}", text="y" * 16_384) for n in range(4)]
        prompt = Prompt(attachments=[Attachment(file_excerpt=one) for one in excerpts])

    with pytest.raises(InvalidArgument, match="draft"):
        await room.write(prompt)


async def test_drafts_on_one_task_are_bounded_together(room: Room) -> None:  # F30, F22
    half = Prompt(text="x" * (DRAFT_BYTES // 2 - 100))
    await room.write(half, "ses_1")
    await room.write(half, "ses_2")

    with pytest.raises(ResourceExhausted) as refused:
        await room.write(Prompt(text="y" * 200), "ses_3")
    await room.write(Prompt(), "ses_1")
    await room.write(Prompt(text="y" * 200), "ses_3")

    assert (refused.value.reason, refused.value.metadata) == ("QUOTA_EXCEEDED", {"limit": "draft_bytes"})


async def test_states_of_one_task_are_bounded_in_number(room: Room) -> None:  # F30
    for number in range(SESSIONS_PER_TASK):
        await room.set_state(f"ses_{number}", unread=True)

    with pytest.raises(InvalidArgument, match="session_id"):
        await room.set_state("ses_more", unread=True)
    await room.set_state("ses_0", unread=False)


async def test_states_are_forgotten_with_member_task_or_organization(room: Room) -> None:  # ORG-9
    await room.write(Prompt(text="half written"))
    bind_principal(Principal(user_id="usr_2", organization_id="org_1"))
    await room.set_state(open_session_id="ses_1")
    bind_principal(Principal(user_id="usr_1", organization_id="org_2"))
    await room.set_state(task_id="task_9", unread=True)

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
    draft = (await room.pushed(user_pb2.DraftState))["usr_1/task_1/"]
    assert draft.deleted
    assert b"half written" not in draft.payload


async def test_revisions_go_on_where_a_state_was_forgotten(room: Room) -> None:
    """An index that holds the tombstone would ignore a state that began again at one."""
    await room.set_state(unread=True)
    first = await room.write(Prompt(text="old"))
    await room.forget(organization_id="org_1")

    again = await room.set_state(unread=True)
    second = await room.write(Prompt(text="new"))

    assert again.revision == 4
    assert not again.HasField("draft_time")
    assert (first.revision, second.revision) == (1, 3)
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
    await room.set_state(unread=False)
    await room.database.write(room.task_states.prune)
    kept = await room.database.read(lambda tx: len(tx.rows(_APPLIED)))
    later = TaskStates(room.task_states.outbox, Later())

    await room.database.write(later.prune)

    assert kept == 1
    assert await room.database.read(lambda tx: len(tx.rows(_APPLIED))) == 0
    assert (await room.set_state(unread=True)).revision > 2, "a state that lives is kept"


async def test_preferences_are_changed_once_for_one_request(room: Room) -> None:  # F11
    await room.create("usr_1")
    request = users_pb2.UpdateUserRequest(request_id="r")
    request.user.preferences.default_agent = "mock"

    answers = await asyncio.gather(*(room.public.UpdateUser(request, CONTEXT) for _ in range(4)))

    assert all(answer == answers[0] for answer in answers)
    assert answers[0].user.revision == 2


async def test_a_state_says_when_its_draft_was_written_and_no_more(room: Room) -> None:
    await room.write(Prompt(text="what nobody else reads"))
    pushed = (await room.pushed(UserTaskState))["usr_1/task_1/"]
    state = UserTaskState()
    any_pb2.Any(type_url=pushed.type_url, value=pushed.payload).Unpack(state)

    assert state.HasField("draft_time")
    assert b"what nobody else reads" not in pushed.payload
    await room.write(Prompt())
    assert (await room.pushed(user_pb2.DraftState))["usr_1/task_1/"].deleted
    assert not (await room.set_state(unread=True)).HasField("draft_time")


async def test_forgotten_drafts_are_pruned_after_a_week(room: Room) -> None:
    await room.write(Prompt(text="kept"), "ses_1")
    await room.write(Prompt(text="dropped"), "ses_2")
    await room.write(Prompt(), "ses_2")
    await room.database.write(room.drafts.prune)
    assert await room.database.read(lambda tx: len(tx.rows(_DRAFTS))) == 2
    await room.database.write(Drafts(room.drafts.outbox, Later()).prune)
    assert [row.session_id for row in await room.database.read(lambda tx: tx.rows(_DRAFTS))] == ["ses_1"]


def credential(host: str = "Git.Test", username: str = "me") -> Secret:
    return Secret(git_credential=GitCredential(host=host, username=username))


async def keep(room: Room, secret: Secret, value: bytes = b"s3cr3t", **given: Any) -> Secret:
    request = CreateSecretRequest(secret=secret, value=value, **given)
    return (await room.secrets.CreateSecret(request, CONTEXT)).secret


async def login(room: Room, user_id: str = "usr_1", host: str = "git.test") -> tuple[str, str]:
    request = user_pb2.GetGitCredentialRequest(user_id=user_id, host=host)
    found = await room.internal.GetGitCredential(request, CONTEXT)
    return found.username, found.secret


async def test_a_secret_is_what_git_signs_in_with_until_it_is_changed_or_deleted(room: Room) -> None:
    secret = await keep(room, credential())
    assert await login(room) == ("me", "s3cr3t")
    assert await login(room, "usr_2") == await login(room, host="other.test") == ("", "")

    changed = Secret(id=secret.id, description="for the robot", etag=secret.etag)
    request = UpdateSecretRequest(secret=changed, value=b"n3w")
    answer = (await room.secrets.UpdateSecret(request, CONTEXT)).secret
    assert (answer.description, answer.revision) == ("for the robot", 2)
    assert await login(room) == ("me", "n3w")
    with pytest.raises(Aborted):
        await room.secrets.UpdateSecret(request, CONTEXT)

    await room.secrets.DeleteSecret(DeleteSecretRequest(secret_id=secret.id), CONTEXT)
    assert await login(room) == ("", "")
    assert (await room.pushed(Secret))[secret.id].deleted
    again = await keep(room, credential())
    assert again.id != secret.id


async def test_the_value_of_a_secret_is_never_readable(room: Room) -> None:
    """Not in what is answered, pushed, remembered or kept."""
    given = credential()
    given.description, given.revision, given.user_id = "mine", 2**63 - 1, "usr_2"
    request_id = "8f14e45f-ceea-4f7a-9c3b-0a1b2c3d4e5f"
    secret = await keep(room, given, request_id=request_id)
    repeated = await keep(room, given, request_id=request_id)
    request = UpdateSecretRequest(secret=Secret(id=secret.id), value=b"s3cr3t-2", request_id=request_id)
    answer = await room.secrets.UpdateSecret(request, CONTEXT)

    assert repeated == secret
    assert (secret.user_id, secret.revision) == ("usr_1", 1)
    assert await login(room) == ("me", "s3cr3t-2")
    rows = await room.database.read(lambda tx: [*tx.rows(_SECRETS), *tx.rows(_REMEMBERED), *tx.rows(_ALL_MARKS)])
    assert len(rows) >= 4
    for shown in (secret.SerializeToString(), answer.SerializeToString(), repr(rows).encode()):
        assert b"s3cr3t" not in shown


async def test_a_user_has_one_secret_for_a_host_and_nobody_elses(room: Room) -> None:
    secret = await keep(room, credential())
    with pytest.raises(AlreadyExists) as taken:
        await keep(room, credential("git.test", "other"))
    assert (taken.value.reason, taken.value.metadata["secret_id"]) == ("SECRET_EXISTS", secret.id)
    with pytest.raises(InvalidArgument):
        await keep(room, Secret(description="for nothing"))
    for value in (b"two\nlines", b"\xff"):
        with pytest.raises(InvalidArgument, match="value"):
            await keep(room, credential("third.test"), value)

    bind_principal(Principal(user_id="usr_2", organization_id="org_1"))
    for attempt in (
        room.secrets.UpdateSecret(UpdateSecretRequest(secret=Secret(id=secret.id), value=b"x"), CONTEXT),
        room.secrets.DeleteSecret(DeleteSecretRequest(secret_id=secret.id), CONTEXT),
    ):
        with pytest.raises(NotFound):
            await attempt
