"""Positions that clients carry: consistency tokens (a command's effect) and resume tokens (a place in a watch).

Both are opaque to clients: a protobuf message in unpadded URL-safe base64.
"""

import base64
import binascii
from collections.abc import Iterable

from branchline.spine.v1.push_pb2 import ConsistencyPoint, EntityRevision, ResumePoint
from google.protobuf.message import DecodeError, Message

from services.runtime.errors import InvalidArgument


def consistency_token(entities: Iterable[tuple[str, str, int]]) -> str:
    """Name entities as (kind, id, revision) that a later read must have seen."""
    revisions = [EntityRevision(kind=kind, id=entity_id, revision=revision) for kind, entity_id, revision in entities]
    return _encode(ConsistencyPoint(entities=revisions))


def parse_consistency_token(token: str) -> ConsistencyPoint:
    """Read a consistency token; an empty one names nothing. Raise InvalidArgument if it is not ours."""
    point = ConsistencyPoint()
    _decode(token, point, "consistency_token")
    return point


def resume_token(topic: str, epoch: str, change_seq: int) -> str:
    """Name a place in a watch."""
    return _encode(ResumePoint(topic=topic, epoch=epoch, change_seq=change_seq))


def parse_resume_token(token: str, topic: str) -> ResumePoint | None:
    """Read a resume token; an empty one gives None.

    Raise InvalidArgument if it is not ours or belongs to another topic.
    """
    if not token:
        return None
    point = ResumePoint()
    _decode(token, point, "resume_token")
    if point.topic != topic:
        raise InvalidArgument("resume_token", "belongs to another watch", "RESUME_TOKEN_INVALID")
    return point


def page_token(cursor: str) -> str:
    """Hide a cursor in a page token."""
    return base64.urlsafe_b64encode(cursor.encode()).decode().rstrip("=") if cursor else ""


def parse_page_token(token: str) -> str:
    """Return the cursor of a page token; raise InvalidArgument if it is not ours."""
    try:
        return _unpadded(token).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument("page_token", "is not one of ours", "PAGE_TOKEN_INVALID") from error


def _encode(message: Message) -> str:
    return base64.urlsafe_b64encode(message.SerializeToString(deterministic=True)).decode().rstrip("=")


def _decode(token: str, message: Message, field: str) -> None:
    try:
        message.ParseFromString(_unpadded(token))
    except (binascii.Error, ValueError, DecodeError) as error:
        raise InvalidArgument(field, "is not one of ours", f"{field.upper()}_INVALID") from error


def _unpadded(token: str) -> bytes:
    return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
