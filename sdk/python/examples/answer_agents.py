"""Say yes to whatever agents of an organization ask, once, whichever task it is of.

BRANCHLINE_TOKEN=$(cat data/token) python answer_agents.py
"""

import asyncio
import os

from branchline import AsyncClient, BranchlineError, OrganizationView
from branchline.v1.common_pb2 import ENTITY_KIND_INPUT_REQUEST
from branchline.v1.errors_pb2 import ERROR_REASON_ALREADY_ANSWERED, ERROR_REASON_NO_LONGER_WAITING
from branchline.v1.sessions_pb2 import AnswerInputRequestRequest
from branchline.v1.transcripts_pb2 import (
    INPUT_REQUEST_STATE_PENDING,
    PERMISSION_OPTION_KIND_ALLOW_ONCE,
    Decline,
    InputAnswer,
    InputRequest,
)
from branchline.v1.users_pb2 import GetCurrentUserRequest

ADDRESS, TOKEN = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700"), os.environ["BRANCHLINE_TOKEN"]


def answer_to(asked: InputRequest) -> InputAnswer:
    """Allow what can be allowed; a question is for somebody who knows."""
    for option in asked.permission.options:
        if option.kind == PERMISSION_OPTION_KIND_ALLOW_ONCE:
            return InputAnswer(option_id=option.id)
    return InputAnswer(decline=Decline(reason="nobody is here"))


def waiting(view: OrganizationView) -> list[InputRequest]:
    return [one for one in view.input_requests.values() if one.state == INPUT_REQUEST_STATE_PENDING]


async def main() -> None:
    async with AsyncClient(ADDRESS, TOKEN) as client:
        me = await client.users.get_current_user(GetCurrentUserRequest())
        organization_id = me.memberships[0].organization_id
        async with client.watch_organization(organization_id, kinds=[ENTITY_KIND_INPUT_REQUEST]) as view:
            await view.wait_for(lambda view: bool(waiting(view)))
            for asked in waiting(view):
                print(asked.permission.tool_call.title or asked.question.text)
                try:
                    await client.sessions.answer_input_request(
                        AnswerInputRequestRequest(
                            task_id=asked.task_id, input_request_id=asked.id, answer=answer_to(asked)
                        )
                    )
                except BranchlineError as error:  # somebody was faster, or the agent was stopped
                    if error.reason not in {ERROR_REASON_ALREADY_ANSWERED, ERROR_REASON_NO_LONGER_WAITING}:
                        raise
                    print(error)


if __name__ == "__main__":
    asyncio.run(main())
