"""Positions that clients carry.

Consistency tokens name a command's effect, resume tokens a place in a watch, page tokens a place in a list. All are
opaque to clients: a protobuf message in unpadded URL-safe base64.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from branchline.v1 import errors_pb2
from branchline.v1.common_pb2 import Consistency, EntityKind
from branchline.v1.errors_pb2 import ErrorReason
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint, CursorValue, EntityRevision, PageCursor, ResumePoint
from google.protobuf.message import DecodeError, Message

from services.runtime.errors import InvalidArgument
from services.runtime.validation import validate

AWAIT_SECONDS = 10.0
"""How long a read waits to be fresh enough where its caller does not say."""

_LONGEST_AWAIT_SECONDS = 30.0
_NOT_BOUND = frozenset({"page_size", "page_token", "consistency"})
_NOT_SELECTED = frozenset({"resume_token", "consistency", "heartbeat_interval"})
_BINDING_BYTES = 12
_MOST_ENTITIES = 40
"""Reads take tokens of 4,096 characters (`consistency_token` of the contract): 40 ids of 64."""

Value = str | int | float


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a watch: which sequence, and the last change that was delivered."""

    epoch: str
    change_seq: int


@dataclass(frozen=True, slots=True)
class Begin:
    """From where a watch shall go on."""

    position: Position | None = None
    changed: bool = False
    """Whether the token was made for a request that selects something else: it is of no use."""


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a read must have seen, and how long it may wait for it."""

    point: ConsistencyPoint
    wait_seconds: float


def consistency_token(entities: Iterable[tuple[EntityKind.ValueType, str, int]]) -> str:
    """Name entities as (kind, id, revision) that a later read must have seen, the most important first.

    No more are named than fit what a read takes.
    """
    first = islice(entities, _MOST_ENTITIES)
    revisions = [EntityRevision(kind=kind, id=entity_id, revision=revision) for kind, entity_id, revision in first]
    return _encode(ConsistencyPoint(entities=revisions))


def parse_consistency(consistency: Consistency) -> Freshness:
    """Read how fresh an answer must be; no tokens name nothing. Raise InvalidArgument if one is not ours."""
    point = ConsistencyPoint()
    for token in consistency.at_least_as_fresh:
        one = ConsistencyPoint()
        field = "consistency.at_least_as_fresh"
        _decode(token, one, field, errors_pb2.ERROR_REASON_CONSISTENCY_TOKEN_INVALID)
        point.entities.extend(one.entities)
    given = consistency.HasField("max_wait")
    wait = consistency.max_wait.ToNanoseconds() / 1e9 if given else AWAIT_SECONDS
    return Freshness(point, min(wait, _LONGEST_AWAIT_SECONDS))


def resume_token(topic: str, position: Position, selection: bytes = b"") -> str:
    """Name a place in a watch, and what the watch selects of its topic."""
    point = ResumePoint(topic=topic, epoch=position.epoch, change_seq=position.change_seq, selection=selection)
    return _encode(point)


def parse_resume_token(token: str, topic: str, selection: bytes = b"") -> Begin:
    """Read a resume token; an empty one begins anew.

    Raise InvalidArgument if it is not ours or belongs to another topic.
    """
    if not token:
        return Begin()
    point = ResumePoint()
    _decode(token, point, "resume_token", errors_pb2.ERROR_REASON_RESUME_TOKEN_INVALID)
    if point.topic != topic:
        sentence = "belongs to another watch"
        raise InvalidArgument("resume_token", sentence, errors_pb2.ERROR_REASON_RESUME_TOKEN_INVALID)
    if point.selection != selection:
        return Begin(changed=True)
    return Begin(Position(point.epoch, point.change_seq))


def organization_topic(organization_id: str) -> str:
    """Return what watches of an organization are about; behind a "/" follows whose watch it is."""
    return f"organization/{organization_id}"


def history_topic(organization_id: str) -> str:
    """Return what watches of an organization's feed are about; everybody sees the same of it."""
    return f"history/{organization_id}"


def selection_of(request: Message) -> bytes:
    """Return what a watch's request selects, in a few bytes: everything in it but place, freshness and heartbeat."""
    return _hash(request, _NOT_SELECTED)


def page_token(request: Message, values: Sequence[Value]) -> str:
    """Name the last row of a page by its sort values. The token is good for the same request alone."""
    return _encode(PageCursor(binding=_binding(request), values=[_cursor_value(value) for value in values]))


def parse_page_token(request: Message, token: str, *kinds: type[Value]) -> list[Value] | None:
    """Return the sort values of the row that a page begins behind; None for the first page.

    Raise InvalidArgument if the token is not ours, belongs to another request, or holds values of other types.
    """
    if not token:
        return None
    cursor = PageCursor()
    _decode(token, cursor, "page_token", errors_pb2.ERROR_REASON_PAGE_TOKEN_INVALID)
    values: list[Value] = [_value(value) for value in cursor.values]
    if cursor.binding != _binding(request):
        raise InvalidArgument("page_token", "belongs to another request", errors_pb2.ERROR_REASON_PAGE_TOKEN_INVALID)
    if [type(value) for value in values] != list(kinds):
        raise InvalidArgument("page_token", "is not one of ours", errors_pb2.ERROR_REASON_PAGE_TOKEN_INVALID)
    return values


def _binding(request: Message) -> bytes:
    return _hash(request, _NOT_BOUND)


def _hash(request: Message, left_out: frozenset[str]) -> bytes:
    bound = type(request)()
    bound.CopyFrom(request)
    for field in left_out & set(request.DESCRIPTOR.fields_by_name):
        bound.ClearField(field)
    named = request.DESCRIPTOR.full_name.encode() + b"\0" + bound.SerializeToString(deterministic=True)
    return hashlib.sha256(named).digest()[:_BINDING_BYTES]


def _cursor_value(value: Value) -> CursorValue:
    if isinstance(value, str):
        return CursorValue(text=value)
    return CursorValue(number=value) if isinstance(value, int) else CursorValue(seconds=value)


def _value(value: CursorValue) -> Value:
    return getattr(value, value.WhichOneof("value") or "text")


def _encode(message: Message) -> str:
    return base64.urlsafe_b64encode(message.SerializeToString(deterministic=True)).decode().rstrip("=")


def _decode(token: str, message: Message, field: str, reason: ErrorReason.ValueType) -> None:
    try:
        message.ParseFromString(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        validate(message)  # no store takes the character U+0000, either
    except (binascii.Error, ValueError, DecodeError, InvalidArgument) as error:
        raise InvalidArgument(field, "is not one of ours", reason) from error
