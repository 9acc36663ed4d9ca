"""People and their tokens. Each change is marked for the organization."""

from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_API_TOKEN, ENTITY_KIND_USER
from branchline.v1.users_pb2 import ApiToken, TokenScope, User
from branchline_internal.user.v1.user_pb2 import ApiTokenState
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, select, update

from services.runtime.clock import Clock
from services.runtime.database import Statement, Tx, insert
from services.runtime.errors import NotFound
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.runtime.updates import etag_of
from services.user.tables import api_tokens, users

SETTABLE = ("display_name", "preferences")
"""What people change of themselves."""


USERS = Resources(users, User, ENTITY_KIND_USER, columns=lambda user: {"id": user.id, "email": user.email})
USERS_OF_EMAIL = USERS.by("email")

_ADD_TOKEN = Statement(insert(api_tokens))
_TOKEN = Statement(
    select(api_tokens).where(api_tokens.c.id == bindparam("token"), api_tokens.c.user_id == bindparam("user"))
)
_TOKEN_OF_SECRET = Statement(
    select(api_tokens.c.payload).where(
        api_tokens.c.user_id == bindparam("user"), api_tokens.c.token_hash == bindparam("hash")
    )
)
_REVOKE = Statement(
    update(api_tokens)
    .where(api_tokens.c.id == bindparam("token"))
    .values(revoke_time=bindparam("now"), payload=bindparam("state"))
)


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
        user.etag = etag_of(user, SETTABLE)
        USERS.save(tx, [user])
        self.outbox.mark(tx, [Mark(user.id, user.revision, user)])

    def new_token(
        self,
        user_id: str,
        display_name: str,
        token_hash: str,
        *,
        expire_time: Timestamp | None = None,
        scope: TokenScope | None = None,
    ) -> NewToken:
        """Make what is known of an API token."""
        token = ApiToken(
            id=self.clock.new_id("tok"),
            user_id=user_id,
            display_name=display_name,
            expire_time=expire_time,
            create_time=self.clock.timestamp(),
            scope=scope,
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

    def ensure_token(self, tx: Tx, new: NewToken) -> ApiToken:
        """Store an API token; return the one that has its secret already, if there is one."""
        row: Any = tx.row(_TOKEN_OF_SECRET, {"user": new.token.user_id, "hash": new.token_hash})
        if row is not None:
            return ApiToken.FromString(row.payload)
        self.add_token(tx, new)
        return new.token

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
