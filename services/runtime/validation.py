"""The protovalidate rules of the contract, turned into our errors."""

import protovalidate
from google.protobuf.message import Message
from protovalidate import Violation

from services.runtime.errors import InvalidArgument

_validator = protovalidate.Validator()


def _path(violation: Violation) -> str:
    path = violation.proto.field
    return ".".join(element.field_name for element in path.elements) if path else ""


def validate(message: Message) -> None:
    """Raise InvalidArgument naming every field that breaks a rule of its proto."""
    violations = [(_path(violation), violation.proto.message) for violation in _validator.collect_violations(message)]
    if not violations:
        return
    error = InvalidArgument(violations[0][0] or "request", violations[0][1])
    error.violations = violations
    raise error
