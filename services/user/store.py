"""Queries of the user service. Each change bumps the entity's revision and marks it for the organization."""

from dataclasses import dataclass

from branchline.resource.v1.organization_pb2 import ROLE_UNSPECIFIED, Role
from branchline.resource.v1.user_pb2 import ApiToken, User, UserTaskState
from branchline.user.v1.user_pb2 import ApiTokenState
from cryptography.fernet import Fernet
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from services.runtime.database import Database, Transaction
from services.runtime.errors import NotFound
from services.runtime.secrets import new_token, token_hash
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark
from services.user.tables import api_tokens, applied_events, git_credentials, user_task_states, users


@dataclass(frozen=True, slots=True)
class GitCredential:
    """What git signs in with at one host."""

    username: str
    secret: str


@dataclass(frozen=True, slots=True)
class UserStore:
    """Users, their tokens and credentials, and their per-task state."""

    chassis: Chassis
    cipher: Fernet

    @property
    def database(self) -> Database:
        """The service's database."""
        return self.chassis.database

    async def find(self, tx: Transaction, user_id: str) -> User | None:
        """Return a user, or None."""
        payload = (await tx.execute(select(users.c.payload).where(users.c.id == user_id))).scalar_one_or_none()
        return User.FromString(payload) if payload is not None else None

    async def get(self, tx: Transaction, user_id: str) -> User:
        """Return a user; raise NotFound."""
        user = await self.find(tx, user_id)
        if user is None:
            raise NotFound("user", user_id)
        return user

    async def save(self, tx: Transaction, user: User) -> None:
        """Store a new state of a user."""
        user.revision += 1
        values = {"revision": user.revision, "payload": user.SerializeToString()}
        statement = upsert(users).values(id=user.id, **values)
        await tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
        await self.chassis.outbox.mark(tx, [Mark(user.id, user.revision, user)])

    async def issue_token(
        self,
        tx: Transaction,
        user_id: str,
        name: str,
        expire_time: Timestamp | None = None,
        role_limit: Role.ValueType = ROLE_UNSPECIFIED,
    ) -> tuple[ApiToken, str]:
        """Make an API token; return what is known of it, and the token itself."""
        clock = self.chassis.clock
        secret = new_token()
        token = ApiToken(
            id=clock.new_id("tok"),
            user_id=user_id,
            name=name,
            expire_time=expire_time,
            create_time=clock.timestamp(),
            role_limit=role_limit,
            revision=1,
        )
        hashed = token_hash(secret)
        await tx.execute(
            insert(api_tokens).values(
                id=token.id, user_id=user_id, token_hash=hashed, payload=token.SerializeToString()
            )
        )
        state = ApiTokenState(api_token=token, token_hash=hashed)
        await self.chassis.outbox.mark(tx, [Mark(token.id, token.revision, state)])
        return token, secret

    async def revoke_token(self, tx: Transaction, user_id: str, token_id: str) -> ApiToken:
        """End a token of the user; raise NotFound. Ending it twice is the same as once."""
        query = select(api_tokens).where(api_tokens.c.id == token_id, api_tokens.c.user_id == user_id)
        row = (await tx.execute(query)).one_or_none()
        if row is None:
            raise NotFound("api_token", token_id)
        token = ApiToken.FromString(row.payload)
        if row.revoke_time is not None:
            return token
        token.revision += 1
        now = self.chassis.clock
        await tx.execute(
            update(api_tokens)
            .where(api_tokens.c.id == token_id)
            .values(revoke_time=now.seconds(), payload=token.SerializeToString())
        )
        state = ApiTokenState(api_token=token, token_hash=row.token_hash, revoke_time=now.timestamp())
        await self.chassis.outbox.mark(tx, [Mark(token.id, token.revision, state)])
        return token

    async def set_credential(self, tx: Transaction, user_id: str, host: str, credential: GitCredential) -> None:
        """Store a credential encrypted; an empty secret removes it."""
        key = (git_credentials.c.user_id == user_id, git_credentials.c.host == host)
        await tx.execute(delete(git_credentials).where(*key))
        if credential.secret:
            await tx.execute(
                insert(git_credentials).values(
                    user_id=user_id,
                    host=host,
                    username=credential.username,
                    secret_encrypted=self.cipher.encrypt(credential.secret.encode()),
                )
            )

    async def credential(self, user_id: str, host: str) -> GitCredential | None:
        """Return a credential, or None."""
        query = select(git_credentials).where(git_credentials.c.user_id == user_id, git_credentials.c.host == host)
        async with self.database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        return GitCredential(row.username, self.cipher.decrypt(row.secret_encrypted).decode())

    async def task_state(self, tx: Transaction, key: UserTaskState) -> UserTaskState:
        """Return the state of (user, task, session), or a fresh one."""
        table = user_task_states
        query = select(table.c.payload).where(
            table.c.user_id == key.user_id, table.c.task_id == key.task_id, table.c.session_id == key.session_id
        )
        payload = (await tx.execute(query)).scalar_one_or_none()
        return UserTaskState.FromString(payload) if payload is not None else key

    async def save_task_state(self, tx: Transaction, state: UserTaskState) -> None:
        """Store a new state of (user, task, session)."""
        state.revision += 1
        values = {"revision": state.revision, "payload": state.SerializeToString()}
        statement = upsert(user_task_states).values(
            user_id=state.user_id, task_id=state.task_id, session_id=state.session_id, **values
        )
        await tx.execute(
            statement.on_conflict_do_update(index_elements=["user_id", "task_id", "session_id"], set_=values)
        )
        await self.chassis.outbox.mark(tx, [Mark(task_state_id(state), state.revision, state)])

    async def first_time(self, tx: Transaction, event_id: str) -> bool:
        """Remember an event; say whether it was new."""
        statement = upsert(applied_events).values(event_id=event_id, apply_time=self.chassis.clock.seconds())
        return (await tx.execute(statement.on_conflict_do_nothing())).rowcount > 0


def task_state_id(state: UserTaskState) -> str:
    """Return the id under which a per-user state is pushed and indexed."""
    return "/".join((state.user_id, state.task_id, state.session_id))
