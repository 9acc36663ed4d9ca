"""The public commands of people on their own accounts."""

from dataclasses import dataclass

from branchline.v1 import users_pb2, users_pb2_grpc
from branchline.v1.users_pb2 import UserTaskState
from branchline.v1.vocabulary_pb2 import (
    ENTITY_KIND_API_TOKEN,
    ENTITY_KIND_USER,
    ENTITY_KIND_USER_TASK_STATE,
)

from services.runtime.database import Database, Tx
from services.runtime.principal import current_principal
from services.runtime.secrets import new_token, token_hash
from services.runtime.serving import Context
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token
from services.user.accounts import USERS, Accounts, GitCredential
from services.user.task_states import Change, TaskStates, task_state_id


@dataclass(frozen=True, slots=True)
class PublicUserServicer(users_pb2_grpc.UserServiceServicer):
    """The caller's own account and state."""

    database: Database
    commands: Commands
    accounts: Accounts
    task_states: TaskStates

    async def UpdatePreferences(
        self, request: users_pb2.UpdatePreferencesRequest, context: Context
    ) -> users_pb2.UpdatePreferencesResponse:
        """Replace the caller's preferences."""
        return await self.commands.run(request, users_pb2.UpdatePreferencesResponse, self._update, request)

    def _update(self, tx: Tx, request: users_pb2.UpdatePreferencesRequest) -> users_pb2.UpdatePreferencesResponse:
        user = USERS.take(tx, current_principal().user_id)
        user.preferences.CopyFrom(request.preferences)
        self.accounts.save(tx, user)
        named = consistency_token([(ENTITY_KIND_USER, user.id, user.revision)])
        return users_pb2.UpdatePreferencesResponse(user=user, consistency_token=named)

    async def CreateApiToken(
        self, request: users_pb2.CreateApiTokenRequest, context: Context
    ) -> users_pb2.CreateApiTokenResponse:
        """Create a token for the caller."""
        secret = new_token()
        new = self.accounts.new_token(
            current_principal().user_id,
            request.name,
            token_hash(secret),
            expire_time=request.expire_time if request.HasField("expire_time") else None,
            role_limit=request.role_limit,
        )
        await self.database.write(self.accounts.add_token, new)
        named = consistency_token([(ENTITY_KIND_API_TOKEN, new.token.id, new.token.revision)])
        return users_pb2.CreateApiTokenResponse(api_token=new.token, secret=secret, consistency_token=named)

    async def RevokeApiToken(
        self, request: users_pb2.RevokeApiTokenRequest, context: Context
    ) -> users_pb2.RevokeApiTokenResponse:
        """End a token of the caller."""
        user_id = current_principal().user_id
        token = await self.database.write(self.accounts.revoke_token, user_id, request.token_id)
        named = consistency_token([(ENTITY_KIND_API_TOKEN, token.id, token.revision)])
        return users_pb2.RevokeApiTokenResponse(consistency_token=named)

    async def SetGitCredential(
        self, request: users_pb2.SetGitCredentialRequest, context: Context
    ) -> users_pb2.SetGitCredentialResponse:
        """Store or remove a git credential of the caller."""
        credential = GitCredential(request.username, request.secret)
        user_id = current_principal().user_id
        await self.database.write(self.accounts.set_credential, user_id, request.host.lower(), credential)
        return users_pb2.SetGitCredentialResponse()

    async def SetTaskState(
        self, request: users_pb2.SetTaskStateRequest, context: Context
    ) -> users_pb2.SetTaskStateResponse:
        """Change what the caller has open, unread and half written."""
        change = Change(
            open_session_id=request.open_session_id if request.HasField("open_session_id") else None,
            unread=request.unread if request.HasField("unread") else None,
            draft=request.draft if request.HasField("draft") else None,
        )
        state = await self.database.write(self._set_state, request.task_id, request.session_id, change)
        named = consistency_token([(ENTITY_KIND_USER_TASK_STATE, task_state_id(state), state.revision)])
        return users_pb2.SetTaskStateResponse(state=state, consistency_token=named)

    def _set_state(self, tx: Tx, task_id: str, session_id: str, change: Change) -> UserTaskState:
        principal = current_principal()
        key = UserTaskState(
            user_id=principal.user_id,
            organization_id=principal.organization_id,
            task_id=task_id,
            session_id=session_id,
        )
        return self.task_states.change(tx, key, change)
