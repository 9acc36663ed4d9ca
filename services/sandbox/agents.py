"""Opens sessions with agents: start the agent, shake hands, choose the model.

Source: https://agentclientprotocol.com (initialization, session setup, session config options).
"""

from dataclasses import dataclass
from typing import Any

from services.runtime.errors import InvalidArgument
from services.sandbox.agent_server import AgentServer, AgentUnknownError
from services.sandbox.store import SessionRecord

_PROTOCOL_VERSION = 1
_START_SECONDS = 120.0
_INITIALIZE, _NEW_SESSION, _SET_MODEL = 1, 2, 3
FIRST_PROMPT_RPC_ID = 100


@dataclass(frozen=True, slots=True)
class _ModelChoice:
    """How an agent lets its model be chosen: by a config option, or by the older model list."""

    models: list[str]
    config_id: str


async def open_agent(server: AgentServer, record: SessionRecord, directory: str) -> str:
    """Start the agent of a session and return the agent's own id of the session.

    Raise InvalidArgument for an unknown agent or model, AgentError if the agent does not start.
    """
    try:
        await server.request(
            record.connection,
            "initialize",
            {
                "protocolVersion": _PROTOCOL_VERSION,
                "clientCapabilities": {},
                "clientInfo": {"name": "branchline", "version": "1"},
            },
            _INITIALIZE,
            agent=record.agent,
            timeout_seconds=_START_SECONDS,
        )
    except AgentUnknownError as error:
        known = ", ".join(agent.name for agent in await server.agents())
        raise InvalidArgument("agent", f'there is no agent "{record.agent}"; there are: {known}') from error
    opened = await server.request(
        record.connection,
        "session/new",
        {"cwd": directory, "mcpServers": []},
        _NEW_SESSION,
        timeout_seconds=_START_SECONDS,
    )
    session_id = str(opened["sessionId"])
    if record.model:
        await _choose_model(server, record, session_id, opened)
    return session_id


async def _choose_model(
    server: AgentServer, record: SessionRecord, acp_session_id: str, opened: dict[str, Any]
) -> None:
    choice = _model_choice(opened)
    if record.model not in choice.models:
        known = ", ".join(choice.models) or "none can be chosen"
        raise InvalidArgument("model", f'the agent has no model "{record.model}"; there are: {known}')
    if choice.config_id:
        method = "session/set_config_option"
        params = {"sessionId": acp_session_id, "configId": choice.config_id, "value": record.model}
    else:
        method, params = "session/set_model", {"sessionId": acp_session_id, "modelId": record.model}
    await server.request(record.connection, method, params, _SET_MODEL)


def _model_choice(opened: dict[str, Any]) -> _ModelChoice:
    for option in opened.get("configOptions") or []:
        if option.get("category") == "model" or option.get("id") == "model":
            return _ModelChoice([str(value["value"]) for value in _flat(option.get("options") or [])], option["id"])
    listed = (opened.get("models") or {}).get("availableModels") or []
    return _ModelChoice([str(model["modelId"]) for model in listed], "")


def _flat(options: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the choices of a select option, those of its groups included."""
    flat: list[dict[str, Any]] = []
    for option in options:
        flat += option.get("options", [option])
    return flat
