"""What an agent offers in a session: its models, its modes, and what it can do. Pure.

Source: https://agentclientprotocol.com (session setup, session modes, session config options). Agents list models and
modes in config options, or in the older `models` and `modes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from branchline.v1.agents_pb2 import Agent, AgentMode, AgentModel
from branchline.v1.errors_pb2 import ERROR_REASON_AGENT_UNKNOWN

from services.runtime.errors import InvalidArgument
from services.sandbox.members import member, members, text_of
from services.sandbox.words import head

Json = dict[str, Any]

_ID_BYTES = 128
_NAME_BYTES = 256
_WORDS_BYTES = 512
_MOST = {"model": 64, "mode": 32}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be chosen."""

    id: str
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What can be chosen of one kind, "model" or "mode", and how."""

    items: Sequence[Item] = ()
    current: str = ""
    method: str = ""
    """The ACP method that chooses; empty if nothing can be chosen."""
    params: Mapping[str, str] | None = None
    """Its parameters but for the session and the value."""
    value: str = ""
    """Name of the parameter that takes the item's id."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What an agent offers, and what it works with now."""

    agent: Agent
    """Its id, models, modes and capabilities."""
    model: str = ""
    mode: str = ""

    @property
    def takes_images(self) -> bool:
        """Whether it takes images in prompts."""
        return self.agent.capabilities.images


def choice(opened: Mapping[str, Any], kind: str) -> Choice:
    """Read the models or modes out of the answer to `session/new`, or out of a `config_option_update`."""
    for option in members(opened, "configOptions"):
        if option.get("category") == kind or option.get("id") == kind:
            items = [_item(one, "value") for one in _flat(members(option, "options"))]
            params = {"configId": text_of(option, "id")}
            method = "session/set_config_option"
            return Choice(_usable(items, kind), text_of(option, "currentValue"), method, params, "value")
    key = "modelId" if kind == "model" else "id"
    listed = member(opened, f"{kind}s")
    items = [_item(one, key) for one in members(listed, f"available{kind.title()}s")]
    current = text_of(listed, f"current{kind.title()}Id")
    return Choice(_usable(items, kind), current, f"session/set_{kind}", {}, f"{kind}Id")


def offer_of(agent: str, hello: Mapping[str, Any], opened: Mapping[str, Any]) -> Offer:
    """Return what an agent offers, by its answers to `initialize` and `session/new`."""
    models, modes = choice(opened, "model"), choice(opened, "mode")
    told = Agent(id=agent)
    _list(told, opened, models.current, modes.current)
    can = member(hello, "agentCapabilities")
    told.capabilities.images = member(can, "promptCapabilities").get("image") is True
    told.capabilities.resume = can.get("loadSession") is True or "resume" in member(can, "sessionCapabilities")
    return Offer(told, models.current, modes.current)


def relisted(offer: Offer, update: Mapping[str, Any]) -> Offer:
    """Return what an agent offers after a `config_option_update`; what it lists no more is offered no more."""
    told = Agent()
    told.CopyFrom(offer.agent)
    defaults = [next((one.id for one in items if one.is_default), "") for items in (told.models, told.modes)]
    _list(told, update, *defaults)
    return replace(offer, agent=told)


def _list(told: Agent, listing: Mapping[str, Any], default_model: str, default_mode: str) -> None:
    """Write the models and modes that an agent lists, where it lists any."""
    models, modes = choice(listing, "model").items, choice(listing, "mode").items
    if models:
        told.ClearField("models")
    for one in models:
        named = {"id": one.id, "display_name": one.name, "description": one.description}
        told.models.append(AgentModel(**named, is_default=one.id == default_model))
    if modes:
        told.ClearField("modes")
    for one in modes:
        named = {"id": one.id, "display_name": one.name, "description": one.description}
        told.modes.append(AgentMode(**named, is_default=one.id == default_mode))


def selection(opened: Mapping[str, Any], kind: str, wanted: str, agent: str) -> tuple[str, Json]:
    """Return the method and the parameters that choose a model or mode. Raise InvalidArgument naming those known."""
    known = choice(opened, kind)
    names = [one.id for one in known.items]
    if wanted not in names:
        words = f'the agent has no {kind} "{wanted}"; there are: {", ".join(names) or "none that can be chosen"}'
        raise InvalidArgument(kind, words, ERROR_REASON_AGENT_UNKNOWN, agent=agent)
    return known.method, {**(known.params or {}), known.value: wanted}


def is_usable(item_id: str) -> bool:
    """Say whether a model or mode can be named so."""
    return 0 < len(item_id.encode()) <= _ID_BYTES


def name_of(items: Iterable[AgentModel | AgentMode], wanted: str) -> str:
    """Return the name that people know a model or mode by."""
    return next((one.display_name for one in items if one.id == wanted and one.display_name), wanted)


def _item(listed: Mapping[str, Any], key: str) -> Item:
    name, words = text_of(listed, "name"), text_of(listed, "description")
    return Item(text_of(listed, key), head(name, _NAME_BYTES), head(words, _WORDS_BYTES))


def _usable(items: Iterable[Item], kind: str) -> list[Item]:
    """Return the items that can be named; one whose id is cut could not be chosen."""
    found = {one.id: one for one in items if is_usable(one.id)}
    return list(found.values())[: _MOST[kind]]


def _flat(options: list[Json]) -> list[Json]:
    """Return the choices of a select option, those of its groups included."""
    flat: list[Json] = []
    for option in options:
        flat += members(option, "options") if isinstance(option.get("options"), list) else [option]
    return flat
