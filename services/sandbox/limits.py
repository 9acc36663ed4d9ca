"""How long what an agent does, or does not do, is waited for. Settings of the service, all in seconds."""

from services.runtime.config import Config


class Limits(Config, frozen=True):
    """Bounds of turns."""

    silence_seconds: float = 15 * 60.0
    """An agent that says nothing for so long, with no tool call or question open, is asked for a sign of life."""

    answer_seconds: float = 5 * 60.0
    """One that does not give it in so long is ended."""

    turn_seconds: float = 4 * 3600.0
    """A turn ends after this time, whatever it does."""

    cancel_seconds: float = 30.0
    """An agent that goes on for so long after its turn was cancelled is ended."""

    alive_seconds: float = 10.0
    """How often it is looked whether the agent's process is there."""

    mark_seconds: float = 10.0
    """How long an agent has to answer a request that it does not know."""

    withdraw_seconds: float = 2.0
    """How long an agent has to drop a prompt of which it is not known whether it has it."""

    quiet_seconds: float = 1.0
    """How long the event stream must be quiet before the answer on the request itself is believed."""

    stream_seconds: float = 45.0
    """A stream without even a heartbeat for so long is broken; the server sends one every 15 seconds."""

    head_seconds: float = 5.0
    """How long git has to name the commit at the tip of the branch."""

    store_seconds: float = 10.0
    """How long the end of a turn waits for outputs to be stored in blobs."""

    end_seconds: float = 15.0
    """How long is tried, at a time, to end an agent and confirm that its processes are gone."""
