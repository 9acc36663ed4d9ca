"""What a sandbox provider must do. All of it is idempotent by the sandbox's id."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Machine:
    """A running machine and the sandbox-agent server inside it."""

    url: str
    """Base URL of the server, such as "http://127.0.0.1:41234"."""

    token: str
    """Bearer token of the server."""

    home: str
    """Home directory of the agents, absolute, inside the machine."""

    isolation: str
    """How the machine is kept apart from the host, such as "bubblewrap" or "none"."""

    python: str = "python3"
    """The Python (3.9 or newer) inside the machine that supervises processes."""

    vouched: Callable[[], bool] | None = field(default=None, compare=False)
    """Says, blocking, whether the one who listens at the URL now is this machine's. Asked before anything is said on a
    new connection; None where nobody else can listen there."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a sandbox is, for those who look at machines with the provider's own tools."""

    organization_id: str = ""
    task_id: str = ""


NOBODY = Owner()


@dataclass(frozen=True, slots=True)
class Overuse:
    """A sandbox that was ended because it used more than it may."""

    sandbox_id: str
    words: str


class Condition(Enum):
    """Whether a machine is there."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"
    """It does not answer, and nobody knows that it is gone: it may be paused, or slow. It is waited for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at a machine showed."""

    condition: Condition
    machine: Machine | None = None
    """The machine, if it is alive."""

    words: str = ""
    """Why it is not, where more is known than that: such as that it ran out of memory."""


class ProviderError(Exception):
    """The machine could not be made or started; the message says why, with the output's tail."""


class SandboxProvider(Protocol):
    """Makes, stops and destroys machines of one kind."""

    name: str

    async def start(self) -> None:
        """Prepare, before anything else is asked. Raise ProviderError if machines cannot be kept apart as wanted."""
        ...

    async def create(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        """Make the machine, or return it if it runs. Raise ProviderError."""
        ...

    async def resume(self, sandbox_id: str, owner: Owner = NOBODY) -> Machine:
        """Start a stopped machine with its files as they were. Raise ProviderError."""
        ...

    async def pause(self, sandbox_id: str) -> None:
        """Stop the machine and keep its files."""
        ...

    async def destroy(self, sandbox_id: str) -> None:
        """Stop the machine and remove everything of it."""
        ...

    async def probe(self, sandbox_id: str) -> Probe:
        """Look whether the machine runs and its server answers."""
        ...

    async def known(self) -> set[str]:
        """Return the ids of all sandboxes that run or have files, known to the service or not."""
        ...

    async def agents(self, sandbox_id: str) -> set[str]:
        """Return names of the agents' processes, one for each agent that runs. A name is never used again."""
        ...

    async def end_agent(self, sandbox_id: str, process: str) -> bool:
        """End an agent's process with all its descendants; say whether none of them is left."""
        ...

    async def watch(self, ended: Callable[[Overuse], Awaitable[None]]) -> None:
        """Watch for ever what sandboxes use; end those that go beyond their limits, and tell of them."""
        ...

    async def close(self) -> None:
        """Let go of what the provider holds; machines go on."""
        ...
