"""Calls to other services."""

from typing import Any, cast

import grpc
import pytest

from services.runtime.client import UNARY_TIMEOUT_SECONDS, SigningChannel
from services.runtime.principal import Signer


class Noting:
    """A channel whose calls answer with the deadline that they were given."""

    def unary_unary(self, *_: Any) -> Any:
        """Make a call."""

        def call(_request: Any, *, timeout: float | None, metadata: Any) -> float | None:
            return timeout

        return call


@pytest.mark.parametrize(
    ("given", "has"), [({}, UNARY_TIMEOUT_SECONDS), ({"timeout": None}, UNARY_TIMEOUT_SECONDS), ({"timeout": 2.0}, 2.0)]
)
def test_a_call_has_a_deadline_also_on_behalf_of_a_caller_without_one(given: dict[str, Any], has: float) -> None:
    channel = SigningChannel("sandbox", lambda: cast("grpc.aio.Channel", Noting()), Signer("key", "task"))

    assert channel.unary_unary("/any")(None, **given) == has
