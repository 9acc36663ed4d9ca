"""Remembers the first answer of every command, so that repeating a request id repeats the answer."""

import hashlib
from dataclasses import dataclass
from typing import Protocol, TypeVar

from google.protobuf.message import Message
from sqlalchemy import insert, select

from services.runtime.clock import Clock
from services.runtime.database import Transaction
from services.runtime.errors import InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.spine.tables import SpineTables

R = TypeVar("R", bound=Message)


class Command(Protocol):
    """A request message with a `request_id`."""

    @property
    def request_id(self) -> str:
        """The client's id of the request."""
        ...


@dataclass(frozen=True, slots=True)
class Requests:
    """The request memory of one service."""

    tables: SpineTables
    clock: Clock

    async def recall(self, tx: Transaction, request: Command, answer: type[R]) -> R | None:
        """Return the first answer to this request, or None if it is new.

        Raise InvalidArgument if the id was used for another request.
        """
        assert isinstance(request, Message)
        table = self.tables.requests
        query = select(table.c.fingerprint, table.c.response).where(
            table.c.caller == current_principal().caller,
            table.c.method == request.DESCRIPTOR.full_name,
            table.c.request_id == request.request_id,
        )
        row = (await tx.execute(query)).one_or_none()
        if row is None:
            return None
        if row.fingerprint != _fingerprint(request):
            raise InvalidArgument("request_id", "was used for a different request", "REQUEST_ID_REUSED")
        response = answer()
        response.ParseFromString(row.response)
        return response

    async def remember(self, tx: Transaction, request: Command, response: Message) -> None:
        """Keep the answer, in the transaction of the command."""
        assert isinstance(request, Message)
        await tx.execute(
            insert(self.tables.requests).values(
                caller=current_principal().caller,
                method=request.DESCRIPTOR.full_name,
                request_id=request.request_id,
                fingerprint=_fingerprint(request),
                response=response.SerializeToString(),
                create_time=self.clock.seconds(),
            )
        )


def _fingerprint(request: Message) -> str:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
