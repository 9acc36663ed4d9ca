"""How resources are changed by their masks and etags: one way for all `UpdateX` methods.

An etag covers what people can set, so that agents at work do not make it stale.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from branchline.v1.errors_pb2 import ERROR_REASON_ETAG_MISMATCH
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from services.runtime.errors import Aborted, InvalidArgument

TASK_SETTABLE = ("title",)
SESSION_SETTABLE = ("display_name",)
"""What people change of tasks and sessions. Repository and task both make their etags."""

_ETAG_DIGITS = 16


class Tagged(Protocol):
    """A resource with an etag."""

    etag: str


M = TypeVar("M", bound=Message)


def etag_of(resource: Message, settable: Sequence[str]) -> str:
    """Return the etag of a resource whose `settable` fields people can change."""
    kept = type(resource)()
    for name in settable:
        _copy(resource, kept, name)
    return hashlib.sha256(kept.SerializeToString(deterministic=True)).hexdigest()[:_ETAG_DIGITS]


def check_etag(held: Tagged, given: Tagged) -> None:
    """Raise Aborted if an etag is given that is not the one that is held."""
    if given.etag and given.etag != held.etag:
        sentence = "it was changed by somebody else; read it again"
        raise Aborted(ERROR_REASON_ETAG_MISMATCH, sentence, etag=held.etag)


def update(held: M, given: M, mask: FieldMask, settable: Sequence[str], within: str) -> list[str]:
    """Take over the fields of a mask, or, without one, every settable field that is set; return those that changed.

    `settable` names fields of the resource; a mask may name fields within them, such as "settings.default_agent".
    `within` is the request's field that holds the resource. Raise InvalidArgument for a path that cannot be changed.
    """
    paths = list(mask.paths) or [name for name in settable if _is_set(given, name)]
    for path in paths:
        top, _, inner = path.partition(".")
        if top not in settable or not _exists(held, top, inner):
            known = ", ".join(settable)
            raise InvalidArgument("update_mask", f'"{path}" cannot be changed; what can: {known}')
    if not paths:
        raise InvalidArgument(within, "says nothing to change")
    changed: list[str] = []
    for path in paths:
        before, after = held, given
        *inner, name = path.split(".")
        for step in inner:
            before, after = getattr(before, step), getattr(after, step)
        if not _same(before, after, name):
            before.ClearField(name)
            _copy(after, before, name)
            changed.append(path)
    return changed


def _is_set(message: Message, name: str) -> bool:
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence:
        return message.HasField(name)
    return bool(getattr(message, name))


def _exists(message: Message, top: str, inner: str) -> bool:
    """Say whether a path of at most two steps names a field."""
    if not inner:
        return True
    below = message.DESCRIPTOR.fields_by_name[top].message_type
    return below is not None and inner in below.fields_by_name


def _same(one: Message, other: Message, name: str) -> bool:
    return _is_set(one, name) == _is_set(other, name) and getattr(one, name) == getattr(other, name)


def _copy(source: Message, target: Message, name: str) -> None:
    if not _is_set(source, name):
        return
    field = source.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        getattr(target, name).MergeFrom(getattr(source, name))
    elif field.message_type is not None:
        getattr(target, name).CopyFrom(getattr(source, name))
    else:
        setattr(target, name, getattr(source, name))
