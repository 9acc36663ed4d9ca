"""What a session may be opened with, as agents say it. Pure."""

from collections.abc import Iterable
from typing import Protocol

from branchline.v1.agents_pb2 import Agent
from branchline.v1.errors_pb2 import ERROR_REASON_AGENT_UNKNOWN

from services.runtime.errors import InvalidArgument


class Choice(Protocol):
    """An agent, a model and a mode; what is empty is not chosen."""

    @property
    def agent(self) -> str:
        """The agent's id."""
        ...

    @property
    def model(self) -> str:
        """The model's id."""
        ...

    @property
    def mode(self) -> str:
        """The mode's id."""
        ...


def check_choice(known: Iterable[Agent], chosen: Choice, within: str = "") -> None:
    """Raise InvalidArgument for an agent, a model or a mode that is none, where any are known.

    `within` is the path of the request's field that holds the choice, with a dot behind it.
    """
    agents = {agent.id: agent for agent in known}
    if not agents or not chosen.agent:
        return
    agent, names = agents.get(chosen.agent), ", ".join(agents)
    if agent is None:
        words = f'there is no agent "{chosen.agent}"; there are: {names}'
        raise InvalidArgument(f"{within}agent", words, ERROR_REASON_AGENT_UNKNOWN, agent=chosen.agent, agents=names)
    offered = (("model", chosen.model, agent.models), ("mode", chosen.mode, agent.modes))
    for field, wanted, found in offered:
        ids = [one.id for one in found]
        if wanted and ids and wanted not in ids:
            words = f'"{wanted}" is none of: {", ".join(ids)}'
            raise InvalidArgument(f"{within}{field}", words, ERROR_REASON_AGENT_UNKNOWN, agent=agent.id)
