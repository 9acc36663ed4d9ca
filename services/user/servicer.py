"""The gRPC surface of the user service."""

from dataclasses import dataclass
from typing import Any

import grpc
from branchline.gateway.v1 import users_pb2, users_pb2_grpc
from branchline.resource.v1.user_pb2 import User, UserTaskState
from branchline.user.v1 import user_pb2, user_pb2_grpc

from services.runtime.principal import current_principal
from services.runtime.service import Chassis
from services.runtime.spine.tokens import consistency_token
from services.user.store import GitCredential, UserStore, task_state_id

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class UserServicer(user_pb2_grpc.UserServiceServicer):
    """What the organization coordinator asks."""

    chassis: Chassis
    store: UserStore

    async def CreateUser(self, request: user_pb2.CreateUserRequest, context: Context) -> user_pb2.CreateUserResponse:
        """Create a user with a first token, once."""
        async with self.chassis.database.transaction() as tx:
            user = await self.store.find(tx, request.user_id)
            if user is not None:
                return user_pb2.CreateUserResponse(user=user)
            user = User(
                id=request.user_id,
                display_name=request.display_name,
                email=request.email.strip().lower(),
                create_time=self.chassis.clock.timestamp(),
            )
            await self.store.save(tx, user)
            token, secret = await self.store.issue_token(tx, user.id, request.token_name)
        named = consistency_token([("user", user.id, user.revision), ("api_token", token.id, token.revision)])
        return user_pb2.CreateUserResponse(user=user, api_token=secret, consistency_token=named)

    async def GetGitCredential(
        self, request: user_pb2.GetGitCredentialRequest, context: Context
    ) -> user_pb2.GetGitCredentialResponse:
        """Give a credential, or nothing."""
        credential = await self.store.credential(request.user_id, request.host)
        if credential is None:
            return user_pb2.GetGitCredentialResponse()
        return user_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)

    async def MarkUnread(self, request: user_pb2.MarkUnreadRequest, context: Context) -> user_pb2.MarkUnreadResponse:
        """Mark a task unread for users, once per event."""
        async with self.chassis.database.transaction() as tx:
            if not await self.store.first_time(tx, request.event_id):
                return user_pb2.MarkUnreadResponse()
            for user_id in request.user_ids:
                key = UserTaskState(
                    user_id=user_id,
                    organization_id=request.organization_id,
                    task_id=request.task_id,
                    session_id=request.session_id,
                )
                state = await self.store.task_state(tx, key)
                if not state.unread:
                    state.unread = True
                    await self.store.save_task_state(tx, state)
        return user_pb2.MarkUnreadResponse()


@dataclass(frozen=True, slots=True)
class PublicUserServicer(users_pb2_grpc.UserServiceServicer):
    """The public commands on the caller's own account."""

    chassis: Chassis
    store: UserStore

    async def UpdatePreferences(
        self, request: users_pb2.UpdatePreferencesRequest, context: Context
    ) -> users_pb2.UpdatePreferencesResponse:
        """Replace the caller's preferences."""
        async with self.chassis.database.transaction() as tx:
            answer = await self.chassis.requests.recall(tx, request, users_pb2.UpdatePreferencesResponse)
            if answer is not None:
                return answer
            user = await self.store.get(tx, current_principal().user_id)
            user.preferences.CopyFrom(request.preferences)
            await self.store.save(tx, user)
            answer = users_pb2.UpdatePreferencesResponse(
                user=user, consistency_token=consistency_token([("user", user.id, user.revision)])
            )
            await self.chassis.requests.remember(tx, request, answer)
        return answer

    async def CreateApiToken(
        self, request: users_pb2.CreateApiTokenRequest, context: Context
    ) -> users_pb2.CreateApiTokenResponse:
        """Create a token for the caller."""
        expire_time = request.expire_time if request.HasField("expire_time") else None
        async with self.chassis.database.transaction() as tx:
            user_id = current_principal().user_id
            token, secret = await self.store.issue_token(tx, user_id, request.name, expire_time, request.role_limit)
        return users_pb2.CreateApiTokenResponse(
            api_token=token,
            secret=secret,
            consistency_token=consistency_token([("api_token", token.id, token.revision)]),
        )

    async def RevokeApiToken(
        self, request: users_pb2.RevokeApiTokenRequest, context: Context
    ) -> users_pb2.RevokeApiTokenResponse:
        """End a token of the caller."""
        async with self.chassis.database.transaction() as tx:
            token = await self.store.revoke_token(tx, current_principal().user_id, request.token_id)
        return users_pb2.RevokeApiTokenResponse(
            consistency_token=consistency_token([("api_token", token.id, token.revision)])
        )

    async def SetGitCredential(
        self, request: users_pb2.SetGitCredentialRequest, context: Context
    ) -> users_pb2.SetGitCredentialResponse:
        """Store or remove a git credential of the caller."""
        credential = GitCredential(request.username, request.secret)
        async with self.chassis.database.transaction() as tx:
            await self.store.set_credential(tx, current_principal().user_id, request.host.lower(), credential)
        return users_pb2.SetGitCredentialResponse()

    async def SetTaskState(
        self, request: users_pb2.SetTaskStateRequest, context: Context
    ) -> users_pb2.SetTaskStateResponse:
        """Change what the caller has open, unread and half written."""
        principal = current_principal()
        key = UserTaskState(
            user_id=principal.user_id,
            organization_id=principal.organization_id,
            task_id=request.task_id,
            session_id=request.session_id,
        )
        async with self.chassis.database.transaction() as tx:
            state = await self.store.task_state(tx, key)
            if request.HasField("open_session_id"):
                state.open_session_id = request.open_session_id
            if request.HasField("unread"):
                state.unread = request.unread
            if request.HasField("draft"):
                state.draft.CopyFrom(request.draft)
            await self.store.save_task_state(tx, state)
        return users_pb2.SetTaskStateResponse(
            state=state,
            consistency_token=consistency_token([("user_task_state", task_state_id(state), state.revision)]),
        )
