"""Whom tokens speak for, and that asking for it never holds the gateway. AUTH."""

import asyncio
import signal
from collections.abc import Generator
from typing import Any

import pytest
from branchline.v1.users_pb2 import User
from branchline_internal.organization.v1.organization_pb2 import AuthenticateRequest, AuthenticateResponse

from gateway.caller import Authenticator, Caller

USER = "usr_1"
SPINNING_SECONDS = 5


class Organization:
    """Answers with the user; at the end of its first answer the user is changed, and one more call comes."""

    def __init__(self) -> None:
        self.authenticator: Authenticator
        self.asked = 0
        self.late: asyncio.Task[Caller]

    async def Authenticate(self, request: AuthenticateRequest, **_: Any) -> AuthenticateResponse:
        await asyncio.sleep(0)
        self.asked += 1
        if self.asked == 1:
            self.authenticator.forget(USER)
            self.late = asyncio.create_task(self.authenticator.authenticate(request.token_hash))
        return AuthenticateResponse(user=User(id=USER))


@pytest.fixture
def no_spinning() -> Generator[None, None, None]:
    """Interrupt a loop that never waits; no timeout of asyncio could."""

    def interrupt(*_: Any) -> None:
        raise AssertionError("it spins")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SPINNING_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_spinning")
async def test_a_call_that_comes_as_an_outdated_answer_does_asks_again() -> None:
    stub: Any = Organization()
    authenticator = stub.authenticator = Authenticator(stub)

    first = await authenticator.authenticate("hash")
    late = await stub.late

    assert first.user.id == late.user.id == USER
    assert stub.asked == 2
