"""Tokens that a turn used, in the several ways in which agents tell it. Pure."""

from collections.abc import Mapping
from typing import Any

from branchline.v1.transcripts_pb2 import TokenUsage

from services.sandbox.members import count_of

_NAMES = {
    "input_tokens": ("inputTokens", "promptTokens", "input_tokens"),
    "output_tokens": ("outputTokens", "completionTokens", "output_tokens"),
    "total_tokens": ("totalTokens", "total_tokens"),
}
_MOST = 2**63 - 1


def usage_of(told: Mapping[str, Any]) -> TokenUsage:
    """Return what an agent told; nothing of what is no count."""
    usage = TokenUsage()
    for field, names in _NAMES.items():
        counts = (count_of(told, name, _MOST) for name in names)
        setattr(usage, field, next(filter(None, counts), 0))
    return usage


def added(usage: TokenUsage, more: TokenUsage) -> None:
    """Add what one call of the model used to what a turn used."""
    for field in _NAMES:
        setattr(usage, field, min(getattr(usage, field) + getattr(more, field), _MOST))
