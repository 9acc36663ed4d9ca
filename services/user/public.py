"""The public commands of people on their own accounts."""

from dataclasses import dataclass

from branchline.v1 import secrets_pb2, secrets_pb2_grpc, users_pb2, users_pb2_grpc
from branchline.v1.common_pb2 import (
    ENTITY_KIND_API_TOKEN,
    ENTITY_KIND_DRAFT,
    ENTITY_KIND_SECRET,
    ENTITY_KIND_USER,
    ENTITY_KIND_USER_TASK_STATE,
)
from branchline.v1.users_pb2 import UserTaskState
from branchline_internal.user.v1.user_pb2 import DraftState

from services.runtime.database import Tx
from services.runtime.errors import InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.secrets import TOKEN_PREFIX, token_hash
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token
from services.runtime.updates import check_etag, update
from services.user import accounts, keeping
from services.user.accounts import USERS, Accounts, NewToken
from services.user.drafts import Drafts, draft_id
from services.user.keeping import Secrets
from services.user.task_states import TaskStates, task_state_id

_STATE_FIELDS = ("open_session_id", "unread")


@dataclass(frozen=True, slots=True)
class PublicUserServicer(users_pb2_grpc.UserServiceServicer):
    """The caller's own account and state."""

    commands: Commands
    accounts: Accounts
    task_states: TaskStates
    drafts: Drafts

    async def UpdateUser(self, request: users_pb2.UpdateUserRequest, context: Context) -> users_pb2.UpdateUserResponse:
        """Change the caller."""
        return await self.commands.run(request, users_pb2.UpdateUserResponse, self._update, request)

    def _update(self, tx: Tx, request: users_pb2.UpdateUserRequest) -> users_pb2.UpdateUserResponse:
        user = USERS.take(tx, current_principal().user_id)
        if request.user.id not in ("", user.id):
            raise InvalidArgument("user.id", "is not the caller's")
        check_etag(user, request.user)
        if update(user, request.user, request.update_mask, accounts.SETTABLE, "user"):
            if not user.display_name.strip():
                raise InvalidArgument("user.display_name", "must not be empty")
            self.accounts.save(tx, user)
        named = consistency_token([(ENTITY_KIND_USER, user.id, user.revision)])
        return users_pb2.UpdateUserResponse(user=user, consistency_token=named)

    async def CreateApiToken(
        self, request: users_pb2.CreateApiTokenRequest, context: Context
    ) -> users_pb2.CreateApiTokenResponse:
        """Create a token for the caller."""
        expires = request.expire_time if request.HasField("expire_time") else None
        if expires is not None and expires.ToNanoseconds() <= self.accounts.clock.timestamp().ToNanoseconds():
            raise InvalidArgument("expire_time", "must lie in the future")
        secret = TOKEN_PREFIX + self.commands.secret(request)
        new = self.accounts.new_token(
            current_principal().user_id,
            request.display_name,
            token_hash(secret),
            expire_time=expires,
            scope=request.scope if request.HasField("scope") else None,
        )
        answer = await self.commands.run(request, users_pb2.CreateApiTokenResponse, self._create_token, new)
        answer.secret = secret
        return answer

    def _create_token(self, tx: Tx, new: NewToken) -> users_pb2.CreateApiTokenResponse:
        token = self.accounts.ensure_token(tx, new)
        named = consistency_token([(ENTITY_KIND_API_TOKEN, token.id, token.revision)])
        return users_pb2.CreateApiTokenResponse(api_token=token, consistency_token=named)

    async def RevokeApiToken(
        self, request: users_pb2.RevokeApiTokenRequest, context: Context
    ) -> users_pb2.RevokeApiTokenResponse:
        """End a token of the caller."""
        return await self.commands.run(request, users_pb2.RevokeApiTokenResponse, self._revoke, request)

    def _revoke(self, tx: Tx, request: users_pb2.RevokeApiTokenRequest) -> users_pb2.RevokeApiTokenResponse:
        token = self.accounts.revoke_token(tx, current_principal().user_id, request.api_token_id)
        named = consistency_token([(ENTITY_KIND_API_TOKEN, token.id, token.revision)])
        return users_pb2.RevokeApiTokenResponse(consistency_token=named)

    async def UpdateUserTaskState(
        self, request: users_pb2.UpdateUserTaskStateRequest, context: Context
    ) -> users_pb2.UpdateUserTaskStateResponse:
        """Change what the caller has open and unread."""
        return await self.commands.run(request, users_pb2.UpdateUserTaskStateResponse, self._update_state, request)

    def _update_state(
        self, tx: Tx, request: users_pb2.UpdateUserTaskStateRequest
    ) -> users_pb2.UpdateUserTaskStateResponse:
        given = request.user_task_state
        state = self.task_states.take(tx, self._key(given.task_id, given.session_id))
        if update(state, given, request.update_mask, _STATE_FIELDS, "user_task_state"):
            self.task_states.save(tx, state)
        return users_pb2.UpdateUserTaskStateResponse(user_task_state=state, consistency_token=_named(state))

    async def UpdateDraft(
        self, request: users_pb2.UpdateDraftRequest, context: Context
    ) -> users_pb2.UpdateDraftResponse:
        """Keep what the caller has begun to write."""
        return await self.commands.run(request, users_pb2.UpdateDraftResponse, self._update_draft, request)

    def _update_draft(self, tx: Tx, request: users_pb2.UpdateDraftRequest) -> users_pb2.UpdateDraftResponse:
        principal = current_principal()
        draft = self.drafts.set(tx, principal.user_id, principal.organization_id, request.draft)
        state = self.task_states.take(tx, self._key(draft.task_id, draft.session_id))
        state.draft_time.CopyFrom(draft.update_time)
        if not draft.prompt.ByteSize():
            state.ClearField("draft_time")
        self.task_states.save(tx, state)
        held = DraftState(user_id=principal.user_id, draft=draft)
        named = [
            (ENTITY_KIND_DRAFT, draft_id(held), draft.revision),
            (ENTITY_KIND_USER_TASK_STATE, task_state_id(state), state.revision),
        ]
        return users_pb2.UpdateDraftResponse(draft=draft, consistency_token=consistency_token(named))

    def _key(self, task_id: str, session_id: str) -> UserTaskState:
        principal = current_principal()
        return UserTaskState(
            user_id=principal.user_id,
            organization_id=principal.organization_id,
            task_id=task_id,
            session_id=session_id,
        )


@dataclass(frozen=True, slots=True)
class PublicSecretServicer(secrets_pb2_grpc.SecretServiceServicer):
    """The caller's own secrets."""

    commands: Commands
    secrets: Secrets

    async def CreateSecret(
        self, request: secrets_pb2.CreateSecretRequest, context: Context
    ) -> secrets_pb2.CreateSecretResponse:
        """Store a secret of the caller."""
        return await self.commands.run(request, secrets_pb2.CreateSecretResponse, self._create, request)

    def _create(self, tx: Tx, request: secrets_pb2.CreateSecretRequest) -> secrets_pb2.CreateSecretResponse:
        secret = self.secrets.create(tx, current_principal().user_id, request.secret, _checked(request.value))
        named = consistency_token([(ENTITY_KIND_SECRET, secret.id, secret.revision)])
        return secrets_pb2.CreateSecretResponse(secret=secret, consistency_token=named)

    async def UpdateSecret(
        self, request: secrets_pb2.UpdateSecretRequest, context: Context
    ) -> secrets_pb2.UpdateSecretResponse:
        """Change a secret of the caller."""
        return await self.commands.run(request, secrets_pb2.UpdateSecretResponse, self._update, request)

    def _update(self, tx: Tx, request: secrets_pb2.UpdateSecretRequest) -> secrets_pb2.UpdateSecretResponse:
        secret = self.secrets.take(tx, current_principal().user_id, request.secret.id)
        check_etag(secret, request.secret)
        changed = bool(request.value)
        if request.update_mask.paths or request.secret.description or not request.value:
            changed |= bool(update(secret, request.secret, request.update_mask, keeping.SETTABLE, "secret"))
        if changed:
            self.secrets.change(tx, secret, _checked(request.value))
        named = consistency_token([(ENTITY_KIND_SECRET, secret.id, secret.revision)])
        return secrets_pb2.UpdateSecretResponse(secret=secret, consistency_token=named)

    async def DeleteSecret(
        self, request: secrets_pb2.DeleteSecretRequest, context: Context
    ) -> secrets_pb2.DeleteSecretResponse:
        """Forget a secret of the caller."""
        return await self.commands.run(request, secrets_pb2.DeleteSecretResponse, self._delete, request)

    def _delete(self, tx: Tx, request: secrets_pb2.DeleteSecretRequest) -> secrets_pb2.DeleteSecretResponse:
        secret = self.secrets.take(tx, current_principal().user_id, request.secret_id)
        self.secrets.delete(tx, secret)
        named = consistency_token([(ENTITY_KIND_SECRET, secret.id, secret.revision)])
        return secrets_pb2.DeleteSecretResponse(consistency_token=named)


def _named(state: UserTaskState) -> str:
    return consistency_token([(ENTITY_KIND_USER_TASK_STATE, task_state_id(state), state.revision)])


def _checked(value: bytes) -> bytes:
    """Return a git password or token; raise InvalidArgument if it is none that git could take."""
    try:
        words = value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument("value", "is no text") from error
    if any(character in words for character in "\0\r\n"):
        raise InvalidArgument("value", "must not hold line breaks")
    return value
