"""Secrets of people: values are encrypted, and leave this service for the sandboxes of their tasks alone."""

from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_SECRET
from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED, ERROR_REASON_SECRET_EXISTS
from branchline.v1.secrets_pb2 import Secret
from sqlalchemy import bindparam, func, select, update

from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx
from services.runtime.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.user.cipher import Cipher
from services.user.tables import secrets

SETTABLE = ("description",)
SECRETS_PER_USER = 256

_c = secrets.c
_TARGET = Statement(
    select(_c.id).where(_c.user_id == bindparam("user"), _c.target == bindparam("of")).with_for_update()
)
_COUNT = Statement(select(func.count()).where(_c.user_id == bindparam("user")))
_VALUE = Statement(
    select(_c.payload, _c.value_encrypted).where(_c.user_id == bindparam("user"), _c.target == bindparam("of"))
)
_SET_VALUE = Statement(
    update(secrets).where(_c.id == bindparam("secret")).values(value_encrypted=bindparam("encrypted"))
)


@dataclass(frozen=True, slots=True)
class Login:
    """What git signs in with at one host."""

    username: str
    password: str


@dataclass(frozen=True, slots=True)
class Secrets:
    """What people have given to be kept."""

    outbox: Outbox
    clock: Clock
    cipher: Cipher

    def create(self, tx: Tx, user_id: str, given: Secret, value: bytes) -> Secret:
        """Store a secret; raise AlreadyExists if the user has one with the same target."""
        secret = Secret(id=self.clock.new_id("sec"), user_id=user_id, description=given.description)
        if given.HasField("git_credential"):
            secret.git_credential.CopyFrom(given.git_credential)
        secret.create_time.CopyFrom(self.clock.timestamp())
        target = target_of(secret)
        held = tx.value(_TARGET, {"user": user_id, "of": target})
        if held is not None:
            words = f"there is a secret for {target}; update it"
            raise AlreadyExists(ENTITY_KIND_SECRET, held, words, ERROR_REASON_SECRET_EXISTS, secret_id=held)
        tx.take_turn("secrets", user_id)
        if (tx.value(_COUNT, {"user": user_id}) or 0) >= SECRETS_PER_USER:
            words = f"a user keeps at most {SECRETS_PER_USER} secrets"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, words, limit="secrets")
        self._save(tx, secret)
        self._set_value(tx, secret, value)
        return secret

    def take(self, tx: Tx, user_id: str, secret_id: str) -> Secret:
        """Return a secret that will be changed; raise NotFound unless it is the user's."""
        secret = SECRETS.take(tx, secret_id)
        if secret.user_id != user_id:
            raise NotFound(ENTITY_KIND_SECRET, secret_id)
        return secret

    def change(self, tx: Tx, secret: Secret, value: bytes) -> None:
        """Store a new state of a secret, and its new value if one is given."""
        self._save(tx, secret)
        if value:
            self._set_value(tx, secret, value)

    def delete(self, tx: Tx, secret: Secret) -> None:
        """Forget a secret."""
        secret.revision += 1
        SECRETS.delete(tx, secret.id)
        self.outbox.mark(tx, [Mark(secret.id, secret.revision, secret, deleted=True)])

    def login(self, tx: Reader, user_id: str, host: str) -> Login | None:
        """Return what a user signs in with at a git host, or None."""
        row: Any = tx.row(_VALUE, {"user": user_id, "of": _git(host)})
        if row is None:
            return None
        username = Secret.FromString(row.payload).git_credential.username
        return Login(username, self.cipher.decrypt(row.value_encrypted))

    def _save(self, tx: Tx, secret: Secret) -> None:
        secret.revision += 1
        secret.etag = str(secret.revision)  # the value is part of it, and nothing of that may be told by a digest
        secret.update_time.CopyFrom(self.clock.timestamp())
        SECRETS.save(tx, [secret])
        self.outbox.mark(tx, [Mark(secret.id, secret.revision, secret)])

    def _set_value(self, tx: Tx, secret: Secret, value: bytes) -> None:
        tx.change(_SET_VALUE, {"secret": secret.id, "encrypted": self.cipher.encrypt(value.decode())})


def target_of(secret: Secret) -> str:
    """Return what a secret is for, such as "git/github.com"; raise InvalidArgument if it is for nothing."""
    if not secret.HasField("git_credential"):
        raise InvalidArgument("secret.target", "must say what the secret is for")
    return _git(secret.git_credential.host)


def _git(host: str) -> str:
    return f"git/{host.lower()}"


SECRETS = Resources(
    secrets,
    Secret,
    ENTITY_KIND_SECRET,
    columns=lambda secret: {"id": secret.id, "user_id": secret.user_id, "target": target_of(secret)},
    own=["value_encrypted"],
)
