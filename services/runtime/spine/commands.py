"""Commands: each is done once, however often its request is repeated, at the same moment or later.

`run` recalls the first answer, or runs the command's function and remembers its answer, in one transaction. Effects
outside are outbox marks made by the function. Only the few commands that must call out first use `once`. A secret that
an answer tells is never remembered: it follows from the request (`secret`), and is added to the answer each time.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from branchline.v1.errors_pb2 import ERROR_REASON_REQUEST_ID_REUSED
from google.protobuf.message import Message
from sqlalchemy import bindparam, delete, select

from services.runtime.clock import Clock
from services.runtime.database import Database, Raced, Reader, Statement, Tx, insert
from services.runtime.errors import DomainError, InvalidArgument
from services.runtime.lanes import Lanes
from services.runtime.principal import current_principal
from services.runtime.spine.tables import requests

KEEP_SECONDS = 7 * 24 * 3600.0
"""How long the answer to a request is remembered."""

_SECRET_BYTES = 32

P = ParamSpec("P")
R = TypeVar("R", bound=Message)
T = TypeVar("T")

_RECALL = Statement(
    select(requests.c.fingerprint, requests.c.response).where(
        requests.c.caller == bindparam("caller"),
        requests.c.method == bindparam("method"),
        requests.c.request_id == bindparam("request_id"),
    )
)
_REMEMBER = Statement(insert(requests))
_FORGET = Statement(delete(requests).where(requests.c.create_time < bindparam("before")))


class Command(Protocol):
    """A request message with a `request_id`."""

    @property
    def request_id(self) -> str:
        """The client's id of the request; empty for one that will not be repeated."""
        ...


class Commands:
    """The commands of one service."""

    def __init__(self, database: Database, clock: Clock, key: str = "") -> None:
        """`key` is what secrets are made with; without one they are the same for as long as this object lives."""
        self._key = (key or secrets.token_hex()).encode()
        self._database = database
        self._clock = clock
        self._lanes = Lanes()

    async def run(
        self,
        request: Command,
        answer: type[R],
        fn: Callable[Concatenate[Tx, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Return the first answer to this request, or do it: `fn(tx, *args)` makes the answer.

        Raise InvalidArgument if the id was used for another request.
        """

        def whole(tx: Tx) -> R:
            if not request.request_id:
                return fn(tx, *args, **kwargs)
            known = _recall(tx, request, answer)
            if known is not None:
                return known
            try:
                made = fn(tx, *args, **kwargs)
            except DomainError as error:
                if _recall(tx, request, answer) is not None:  # the same at the same moment has done it: that is why
                    raise Raced from error
                raise
            _remember(tx, request, made, now)
            return made

        now = self._clock.seconds()
        return await self._database.write(whole)

    async def once(
        self,
        request: Command,
        answer: type[R],
        outside: Callable[[], Awaitable[T]],
        inside: Callable[[Tx, T], R],
    ) -> R:
        """Return the first answer to this request, or do it: call out, which must be repeatable, then store.

        The same request at the same moment waits for the first.
        """
        if not request.request_id:
            return await self.run(request, answer, inside, await outside())
        async with self._lanes.hold("/".join(_key(request))):
            known = await self._database.read(_recall, request, answer)
            if known is not None:
                return known
            outcome = await outside()
            return await self.run(request, answer, inside, outcome)

    def secret(self, request: Command) -> str:
        """Return the secret, 256 bits, that the answer to a request tells: the same however often it is repeated.

        Nobody can make it without the key. Of a request that will not be repeated it is random.
        """
        if not request.request_id:
            return secrets.token_urlsafe(_SECRET_BYTES)
        digest = hmac.digest(self._key, "/".join((*_key(request), _fingerprint(request))).encode(), "sha256")
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    async def forget_old(self) -> None:
        """Forget requests that are older than `KEEP_SECONDS`."""
        await self._database.write(_forget, self._clock.seconds() - KEEP_SECONDS)


def _key(request: Command) -> tuple[str, str, str]:
    assert isinstance(request, Message)
    return current_principal().caller, request.DESCRIPTOR.full_name, request.request_id


def _recall(tx: Reader, request: Command, answer: type[R]) -> R | None:
    caller, method, request_id = _key(request)
    row: Any = tx.row(_RECALL, {"caller": caller, "method": method, "request_id": request_id})
    if row is None:
        return None
    if row.fingerprint != _fingerprint(request):
        raise InvalidArgument("request_id", "was used for a different request", ERROR_REASON_REQUEST_ID_REUSED)
    return answer.FromString(row.response)


def _remember(tx: Tx, request: Command, response: Message, now: float) -> None:
    caller, method, request_id = _key(request)
    tx.change(
        _REMEMBER,
        {
            "caller": caller,
            "method": method,
            "request_id": request_id,
            "fingerprint": _fingerprint(request),
            "response": response.SerializeToString(),
            "create_time": now,
        },
    )


def _forget(tx: Tx, before: float) -> None:
    tx.change(_FORGET, {"before": before})


def _fingerprint(request: Command) -> str:
    assert isinstance(request, Message)
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
