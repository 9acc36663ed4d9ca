"""People, their tokens and their git credentials. Each change is marked for the organization."""

from dataclasses import dataclass
from typing import Any

from branchline.v1.organizations_pb2 import ROLE_UNSPECIFIED, Role
from branchline.v1.users_pb2 import ApiToken, User
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_API_TOKEN, ENTITY_KIND_USER
from branchline_internal.user.v1.user_pb2 import ApiTokenState
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, delete, select, update

from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, insert, upsert
from services.runtime.errors import NotFound
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.user.cipher import Cipher
from services.user.tables import api_tokens, git_credentials, users

USERS = Resources(users, User, ENTITY_KIND_USER, columns=lambda user: {"id": user.id, "email": user.email})
USERS_OF_EMAIL = USERS.by("email")

_ADD_TOKEN = Statement(insert(api_tokens))
_TOKEN = Statement(
    select(api_tokens).where(api_tokens.c.id == bindparam("token"), api_tokens.c.user_id == bindparam("user"))
)
_REVOKE = Statement(
    update(api_tokens)
    .where(api_tokens.c.id == bindparam("token"))
    .values(revoke_time=bindparam("now"), payload=bindparam("state"))
)
_CREDENTIAL_OF = (git_credentials.c.user_id == bindparam("user"), git_credentials.c.host == bindparam("of"))
_CREDENTIAL = Statement(select(git_credentials).where(*_CREDENTIAL_OF))
_SET_CREDENTIAL = Statement(upsert(git_credentials, ["user_id", "host"]))
_REMOVE_CREDENTIAL = Statement(delete(git_credentials).where(*_CREDENTIAL_OF))


@dataclass(frozen=True, slots=True)
class GitCredential:
    """What git signs in with at one host."""

    username: str
    secret: str


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that is about to be stored. Only its hash is."""

    token: ApiToken
    token_hash: str


@dataclass(frozen=True, slots=True)
class Accounts:
    """Who people are and what they sign in with."""

    outbox: Outbox
    clock: Clock
    cipher: Cipher

    def create(self, tx: Tx, user: User) -> User:
        """Store a new person; return the one who has the id or the e-mail address already, if there is one."""
        holders = USERS_OF_EMAIL(tx, email=user.email) if user.email else []
        held = holders[0] if holders else USERS.find(tx, user.id)
        if held is not None:
            return held
        self.save(tx, user)
        return user

    def save(self, tx: Tx, user: User) -> None:
        """Store a new state of a person."""
        user.revision += 1
        USERS.save(tx, [user])
        self.outbox.mark(tx, [Mark(user.id, user.revision, user)])

    def new_token(
        self,
        user_id: str,
        name: str,
        token_hash: str,
        *,
        expire_time: Timestamp | None = None,
        role_limit: Role.ValueType = ROLE_UNSPECIFIED,
    ) -> NewToken:
        """Make what is known of an API token."""
        token = ApiToken(
            id=self.clock.new_id("tok"),
            user_id=user_id,
            name=name,
            expire_time=expire_time,
            create_time=self.clock.timestamp(),
            role_limit=role_limit,
            revision=1,
        )
        return NewToken(token, token_hash)

    def add_token(self, tx: Tx, new: NewToken) -> None:
        """Store an API token of a person; raise NotFound if there is no such person."""
        token = new.token
        USERS.get(tx, token.user_id)
        given = {"id": token.id, "user_id": token.user_id, "token_hash": new.token_hash, "revoke_time": None}
        tx.change(_ADD_TOKEN, {**given, "payload": token.SerializeToString()})
        state = ApiTokenState(api_token=token, token_hash=new.token_hash)
        self.outbox.mark(tx, [Mark(token.id, token.revision, state)])

    def revoke_token(self, tx: Tx, user_id: str, token_id: str) -> ApiToken:
        """End a token of a person; raise NotFound. Ending it twice is the same as once."""
        row: Any = tx.row(_TOKEN, {"token": token_id, "user": user_id})
        if row is None:
            raise NotFound(ENTITY_KIND_API_TOKEN, token_id)
        token = ApiToken.FromString(row.payload)
        if row.revoke_time is not None:
            return token
        token.revision += 1
        tx.change(_REVOKE, {"token": token_id, "now": self.clock.seconds(), "state": token.SerializeToString()})
        state = ApiTokenState(api_token=token, token_hash=row.token_hash, revoke_time=self.clock.timestamp())
        self.outbox.mark(tx, [Mark(token.id, token.revision, state)])
        return token

    def set_credential(self, tx: Tx, user_id: str, host: str, credential: GitCredential) -> None:
        """Store a credential encrypted; an empty secret removes it."""
        if not credential.secret:
            tx.change(_REMOVE_CREDENTIAL, {"user": user_id, "of": host})
            return
        encrypted = self.cipher.encrypt(credential.secret)
        given = {"user_id": user_id, "host": host, "username": credential.username}
        tx.change(_SET_CREDENTIAL, {**given, "secret_encrypted": encrypted})

    def credential(self, tx: Reader, user_id: str, host: str) -> GitCredential | None:
        """Return a credential, or None."""
        row: Any = tx.row(_CREDENTIAL, {"user": user_id, "of": host})
        if row is None:
            return None
        return GitCredential(row.username, self.cipher.decrypt(row.secret_encrypted))
