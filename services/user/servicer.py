"""What the organization coordinator asks of the user service."""

from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_API_TOKEN, ENTITY_KIND_USER
from branchline.v1.errors_pb2 import ERROR_REASON_OPERATOR_REQUIRED
from branchline.v1.users_pb2 import ApiToken, User, UserTaskState
from branchline_internal.user.v1 import user_pb2, user_pb2_grpc

from services.runtime.database import Database, Tx
from services.runtime.errors import PermissionDenied
from services.runtime.principal import current_principal
from services.runtime.secrets import new_token, token_hash
from services.runtime.serving import Context
from services.runtime.spine.tokens import consistency_token
from services.user.accounts import Accounts, NewToken
from services.user.drafts import Drafts
from services.user.keeping import Secrets
from services.user.task_states import TaskStates


@dataclass(frozen=True, slots=True)
class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Creation of people, and what is done to their accounts from above."""

    database: Database
    accounts: Accounts
    task_states: TaskStates
    drafts: Drafts
    secrets: Secrets

    async def CreateUser(self, request: user_pb2.CreateUserRequest, context: Context) -> user_pb2.CreateUserResponse:
        """Create a person, or give the one who has the id or the e-mail address."""
        user = User(
            id=request.user_id,
            display_name=request.display_name,
            email=request.email.strip().lower(),
            create_time=self.accounts.clock.timestamp(),
        )
        token = self.accounts.new_token(user.id, request.token_name, request.token_hash) if request.token_hash else None
        created, made = await self.database.write(self._create, user, token)
        named = [(ENTITY_KIND_USER, created.id, created.revision)]
        if made is not None:
            named.append((ENTITY_KIND_API_TOKEN, made.id, made.revision))
        return user_pb2.CreateUserResponse(user=created, consistency_token=consistency_token(named))

    def _create(self, tx: Tx, given: User, token: NewToken | None) -> tuple[User, ApiToken | None]:
        user = User()
        user.CopyFrom(given)  # a function may run twice
        created = self.accounts.create(tx, user)
        if token is None or created.id != given.id:
            return created, None
        return created, self.accounts.ensure_token(tx, token)

    async def IssueToken(self, request: user_pb2.IssueTokenRequest, context: Context) -> user_pb2.IssueTokenResponse:
        """Make a further token."""
        if not current_principal().service:
            raise PermissionDenied(ERROR_REASON_OPERATOR_REQUIRED, "people make their own tokens alone")
        secret = new_token()
        new = self.accounts.new_token(request.user_id, request.name, token_hash(secret))
        await self.database.write(self.accounts.add_token, new)
        named = consistency_token([(ENTITY_KIND_API_TOKEN, new.token.id, new.token.revision)])
        return user_pb2.IssueTokenResponse(api_token=secret, consistency_token=named)

    async def ForgetTaskStates(
        self, request: user_pb2.ForgetTaskStatesRequest, context: Context
    ) -> user_pb2.ForgetTaskStatesResponse:
        """Forget what people have open, unread and half written, some at a time."""
        of = (request.organization_id, request.user_id, request.task_id)
        for forget_some in (self.task_states.forget_some, self.drafts.forget_some):
            while await self.database.write(forget_some, *of):
                pass
        return user_pb2.ForgetTaskStatesResponse()

    async def GetGitCredential(
        self, request: user_pb2.GetGitCredentialRequest, context: Context
    ) -> user_pb2.GetGitCredentialResponse:
        """Give a credential, or nothing."""
        login = await self.database.read(self.secrets.login, request.user_id, request.host)
        if login is None:
            return user_pb2.GetGitCredentialResponse()
        return user_pb2.GetGitCredentialResponse(username=login.username, secret=login.password)

    async def MarkUnread(self, request: user_pb2.MarkUnreadRequest, context: Context) -> user_pb2.MarkUnreadResponse:
        """Mark a task unread for people, once per event."""
        of = UserTaskState(
            organization_id=request.organization_id, task_id=request.task_id, session_id=request.session_id
        )
        await self.database.write(self.task_states.mark_unread, request.event_id, request.user_ids, of)
        return user_pb2.MarkUnreadResponse()
