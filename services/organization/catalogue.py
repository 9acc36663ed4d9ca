"""The catalogue of agents and sandbox providers, merged from what sandboxes report."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import ENTITY_KIND_AGENT
from branchline.v1.errors_pb2 import ERROR_REASON_PROVIDER_UNKNOWN
from branchline_internal.organization.v1.organization_pb2 import CheckOptionsRequest
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport
from sqlalchemy import bindparam, select

from services.organization.listing import Listing
from services.organization.tables import agents, sandbox_providers
from services.organization.tasks import Tasks
from services.runtime.agents import check_choice
from services.runtime.database import Reader, Statement, Tx, upsert
from services.runtime.errors import InvalidArgument
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed
from services.runtime.spine.resources import Held

MOST_AGENTS = 200
"""Most agents of one organization; what is reported beyond is passed over."""

_OF = select(agents.c.payload).where(agents.c.scope == bindparam("of"), agents.c.deleted.is_(False))
AGENTS = Listing(Agent, _OF, [agents.c.id], [str])
_AGENTS_OF = Held(agents, Agent, ENTITY_KIND_AGENT, key=("scope", "id")).by("scope", limit=MOST_AGENTS)
_PROVIDERS = Statement(select(sandbox_providers.c.names).where(sandbox_providers.c.organization_id == bindparam("of")))
_PUT_PROVIDERS = Statement(upsert(sandbox_providers, ["organization_id"]))


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What can be asked for in each organization."""

    index: Index
    tasks: Tasks

    def take(self, tx: Tx, pushed: Sequence[Pushed[AgentReport]]) -> None:
        """Merge reports. What they do not change is not written."""
        for one in pushed:
            route = None if one.deleted else self.tasks.route(tx, one.state.task_id)
            if route is not None:
                self._merge(tx, route[0], one.state)

    def _merge(self, tx: Tx, organization_id: str, report: AgentReport) -> None:
        held = {agent.id: agent for agent in _AGENTS_OF(tx, scope=organization_id)}
        changed: list[Agent] = []
        for told in report.agents:
            known = held.get(told.id)
            if not told.id or (known is None and len(held) >= MOST_AGENTS):
                continue
            merged = _merged(organization_id, known, told)
            if merged is not None:
                held[told.id] = merged
                changed.append(merged)
        entries = [Entry(ENTITY_KIND_AGENT, organization_id, one.id, one.revision, one) for one in changed]
        self.index.put_many(tx, entries)
        names = " ".join(sorted(report.sandbox_providers))
        if names and names != tx.value(_PROVIDERS, {"of": organization_id}):
            tx.change(_PUT_PROVIDERS, {"organization_id": organization_id, "names": names})

    def check(self, tx: Reader, request: CheckOptionsRequest) -> None:
        """Raise InvalidArgument for an agent, model, mode or provider that is unknown where some are known."""
        check_choice(_AGENTS_OF(tx, scope=request.organization_id), request.session, "session.")
        provider = request.sandbox.provider
        providers = (tx.value(_PROVIDERS, {"of": request.organization_id}) or "").split()
        if provider and providers and provider not in providers:
            words = f'there is no sandbox provider "{provider}"'
            names = ", ".join(providers)
            raise InvalidArgument(
                "sandbox.provider", words, ERROR_REASON_PROVIDER_UNKNOWN, provider=provider, providers=names
            )


def _merged(organization_id: str, known: Agent | None, told: Agent) -> Agent | None:
    """Return the next state of an agent, or None if a report says nothing new. Lists that it lacks are kept."""
    merged = Agent()
    merged.CopyFrom(told)
    merged.organization_id, merged.revision = organization_id, 1
    if known is None:
        return merged
    if told.update_time.ToNanoseconds() < known.update_time.ToNanoseconds():
        return None
    if not merged.models:
        merged.models.extend(known.models)
    if not merged.modes:
        merged.modes.extend(known.modes)
    if not merged.HasField("capabilities") and known.HasField("capabilities"):
        merged.capabilities.CopyFrom(known.capabilities)
    told_at = merged.update_time.ToNanoseconds()
    merged.update_time.CopyFrom(known.update_time)
    merged.revision = known.revision
    if merged == known:
        return None
    merged.update_time.FromNanoseconds(told_at)
    merged.revision += 1
    return merged
