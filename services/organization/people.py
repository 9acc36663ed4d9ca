"""Who people are and what they sign in with, as the user service pushed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_API_TOKEN, ENTITY_KIND_SECRET, ENTITY_KIND_USER
from branchline.v1.secrets_pb2 import Secret
from branchline.v1.users_pb2 import ApiToken, User
from branchline_internal.user.v1.user_pb2 import ApiTokenState
from sqlalchemy import bindparam, delete, select

from services.organization.listing import Listing
from services.organization.tables import auth_email_index, auth_session_index, secrets, users
from services.runtime.clock import Clock, column_seconds
from services.runtime.database import Reader, Statement, Tx, insert_new, upsert
from services.runtime.spine.hub import Hub
from services.runtime.spine.index import TOMBSTONE_SECONDS
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.resources import Resources

FIRST_TOKEN = "first token"  # noqa: S105 - its name

USERS = Resources(users, User, ENTITY_KIND_USER, columns=lambda user: {"id": user.id})

_tokens = auth_session_index.c
_PUT_TOKEN = Statement(upsert(auth_session_index, ["token_id"], newer="revision"))
_TOKEN = Statement(select(auth_session_index).where(_tokens.token_hash == bindparam("hash")))
TOKENS = Listing(
    ApiToken,
    select(_tokens.payload).where(_tokens.user_id == bindparam("user"), _tokens.revoked.is_(False)),
    [_tokens.token_id],
    [str],
    descending=True,
)
SECRETS = Listing(
    Secret,
    select(secrets.c.payload).where(secrets.c.user_id == bindparam("user"), secrets.c.deleted.is_(False)),
    [secrets.c.id],
    [str],
)
_PUT_SECRET = Statement(upsert(secrets, ["id"], newer="revision"))
_OLD_SECRETS = Statement(
    delete(secrets).where(secrets.c.deleted.is_(True), secrets.c.change_time < bindparam("before"))
)
_ADD_EMAIL = Statement(insert_new(auth_email_index, ["email"]))
_EMAIL = Statement(select(auth_email_index.c.user_id).where(auth_email_index.c.email == bindparam("address")))


@dataclass(frozen=True, slots=True)
class People:
    """What is indexed of users."""

    hub: Hub
    clock: Clock

    def take_users(self, tx: Tx, pushed: Sequence[Pushed[User]]) -> None:
        """Index profiles and e-mail addresses."""
        USERS.put_many(tx, [one.state for one in pushed])
        tx.change_many(_ADD_EMAIL, [{"email": one.state.email, "user_id": one.id} for one in pushed if one.state.email])
        for one in pushed:
            tx.after_commit(partial(self.hub.announce, ENTITY_KIND_USER, one.id))

    def take_tokens(self, tx: Tx, pushed: Sequence[Pushed[ApiTokenState]]) -> None:
        """Index the hashes of tokens."""
        tx.change_many(_PUT_TOKEN, [_token_row(one.state) for one in pushed])
        for one in pushed:
            tx.after_commit(partial(self.hub.announce, ENTITY_KIND_API_TOKEN, one.id))

    def of_email(self, tx: Reader, email: str) -> User | None:
        """Return the person with this address, or None."""
        user_id = tx.value(_EMAIL, {"address": email.strip().lower()})
        return USERS.find(tx, user_id) if user_id else None

    def valid_token(self, tx: Reader, token_hash: str, now_seconds: float) -> ApiToken | None:
        """Return what is known of a token that is neither expired nor revoked, or None."""
        row: Any = tx.row(_TOKEN, {"hash": token_hash})
        if row is None or row.revoked or (row.expire_time is not None and row.expire_time <= now_seconds):
            return None
        return ApiToken.FromString(row.payload)

    def take_secrets(self, tx: Tx, pushed: Sequence[Pushed[Secret]]) -> None:
        """Index secrets, which hold no values."""
        rows = [
            {
                "id": one.id,
                "user_id": one.state.user_id,
                "revision": one.revision,
                "deleted": one.deleted,
                "change_time": self.clock.seconds(),
                "payload": b"" if one.deleted else one.state.SerializeToString(),
            }
            for one in pushed
        ]
        tx.change_many(_PUT_SECRET, rows)
        for one in pushed:
            tx.after_commit(partial(self.hub.announce, ENTITY_KIND_SECRET, one.id))

    def prune(self, tx: Tx) -> None:
        """Forget which secrets were deleted."""
        tx.change(_OLD_SECRETS, {"before": self.clock.seconds() - TOMBSTONE_SECONDS})


def _token_row(state: ApiTokenState) -> dict[str, Any]:
    token = state.api_token
    return {
        "token_id": token.id,
        "token_hash": state.token_hash,
        "user_id": token.user_id,
        "revision": token.revision,
        "expire_time": column_seconds(token.expire_time) if token.HasField("expire_time") else None,
        "revoked": state.HasField("revoke_time"),
        "payload": token.SerializeToString(),
    }
