"""Queries about sandboxes. Each change bumps the revision and marks the sandbox for the task."""

from collections.abc import Callable
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_SANDBOX, Failure
from branchline.v1.errors_pb2 import ERROR_REASON_SANDBOX_GONE
from branchline.v1.sandboxes_pb2 import (
    SANDBOX_STATE_DESTROYED,
    SANDBOX_STATE_DESTROYING,
    SANDBOX_STATE_RUNNING,
    Sandbox,
    SandboxState,
)
from sqlalchemy import bindparam, select, update

from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx
from services.runtime.errors import FailedPrecondition
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.sandbox.tables import sandboxes

GONE = (SANDBOX_STATE_DESTROYING, SANDBOX_STATE_DESTROYED)

SANDBOXES = Resources(
    sandboxes,
    Sandbox,
    ENTITY_KIND_SANDBOX,
    lambda sandbox: {"id": sandbox.id, "task_id": sandbox.task_id, "state": sandbox.state},
    own=("organization_id", "workspace", "remote_url"),
)
_THERE = SANDBOXES.by(where=[sandboxes.c.state != SANDBOX_STATE_DESTROYED])
_DESTROYED = Statement(select(sandboxes.c.id).where(sandboxes.c.state == SANDBOX_STATE_DESTROYED))
_ACTIVE = Statement(
    select(sandboxes.c.payload)
    .where(
        sandboxes.c.task_id == bindparam("task"),
        sandboxes.c.organization_id == bindparam("organization"),
        sandboxes.c.state != SANDBOX_STATE_DESTROYING,
        sandboxes.c.state != SANDBOX_STATE_DESTROYED,
    )
    .order_by(sandboxes.c.id.desc())
    .limit(1)
)
_PLACE = Statement(
    update(sandboxes)
    .where(sandboxes.c.id == bindparam("sandbox"))
    .values(organization_id=bindparam("organization"), remote_url=bindparam("remote"))
)

_WORKSPACE = Statement(
    update(sandboxes).where(sandboxes.c.id == bindparam("sandbox")).values(workspace=bindparam("directory"))
)
_OWN = Statement(
    select(sandboxes.c.organization_id, sandboxes.c.workspace, sandboxes.c.remote_url).where(
        sandboxes.c.id == bindparam("sandbox")
    )
)


@dataclass(frozen=True, slots=True)
class SandboxStore:
    """The sandboxes of this service."""

    outbox: Outbox
    clock: Clock

    def get(self, tx: Reader, sandbox_id: str) -> Sandbox:
        """Return a sandbox; raise NotFound."""
        return SANDBOXES.get(tx, sandbox_id)

    def present(self, tx: Reader, sandbox_id: str) -> Sandbox:
        """Return a sandbox; raise NotFound, or FailedPrecondition if it is destroyed or being destroyed."""
        sandbox = SANDBOXES.get(tx, sandbox_id)
        if sandbox.state in GONE:
            raise FailedPrecondition(ERROR_REASON_SANDBOX_GONE, f"the sandbox {sandbox_id} is destroyed")
        return sandbox

    def organization(self, tx: Reader, sandbox_id: str) -> str:
        """Return the organization of a sandbox; empty if it is not known."""
        row = tx.row(_OWN, {"sandbox": sandbox_id})
        return row.organization_id if row is not None else ""

    def remote_url(self, tx: Reader, sandbox_id: str) -> str:
        """Return the git remote of a sandbox's task; empty if it is not known."""
        row = tx.row(_OWN, {"sandbox": sandbox_id})
        return row.remote_url if row is not None else ""

    def workspace(self, tx: Reader, sandbox_id: str) -> str:
        """Return the directory of a sandbox's working tree; empty if its machine was never made."""
        row = tx.row(_OWN, {"sandbox": sandbox_id})
        return row.workspace if row is not None else ""

    def active(self, tx: Reader, task_id: str, organization_id: str) -> Sandbox | None:
        """Return the newest sandbox of a task that is not gone, or None."""
        payload = tx.value(_ACTIVE, {"task": task_id, "organization": organization_id})
        return Sandbox.FromString(payload) if payload is not None else None

    def there(self, tx: Reader) -> list[Sandbox]:
        """Return every sandbox that is not destroyed."""
        return _THERE(tx)

    def destroyed(self, tx: Reader) -> set[str]:
        """Return the ids of all sandboxes that are destroyed."""
        return {row.id for row in tx.rows(_DESTROYED)}

    def add(self, tx: Tx, sandbox: Sandbox, organization_id: str, remote_url: str) -> None:
        """Store a new sandbox; leave one that is there, whatever its state."""
        if SANDBOXES.find(tx, sandbox.id) is None:
            self._put(tx, sandbox)
            placed = {"sandbox": sandbox.id, "organization": organization_id, "remote": remote_url}
            tx.change(_PLACE, placed)

    def bury(self, tx: Tx, sandbox_id: str) -> bool:
        """Note that a sandbox is gone before it was made, so that a creation on its way is refused.

        Return False if it was made.
        """
        if SANDBOXES.find(tx, sandbox_id) is not None:
            return False
        return SANDBOXES.put(tx, Sandbox(id=sandbox_id, state=SANDBOX_STATE_DESTROYED, revision=1))

    def started(self, tx: Tx, sandbox_id: str, isolation: str, workspace: str) -> None:
        """Note that a machine runs. Raise FailedPrecondition if it is destroyed meanwhile."""
        self.present(tx, sandbox_id)

        def change(sandbox: Sandbox) -> None:
            sandbox.isolation = isolation
            self._stand(sandbox, SANDBOX_STATE_RUNNING, None)

        self._change(tx, sandbox_id, change)
        tx.change(_WORKSPACE, {"sandbox": sandbox_id, "directory": workspace})

    def move(self, tx: Tx, sandbox_id: str, state: SandboxState.ValueType, failure: Failure | None = None) -> bool:
        """Change where a sandbox stands; return False where it does not.

        One that is being destroyed will only be destroyed.
        """

        def change(sandbox: Sandbox) -> None:
            if sandbox.state == SANDBOX_STATE_DESTROYED:
                return
            if sandbox.state == SANDBOX_STATE_DESTROYING and state != SANDBOX_STATE_DESTROYED:
                return
            self._stand(sandbox, state, failure)

        return self._change(tx, sandbox_id, change)

    def _stand(self, sandbox: Sandbox, state: SandboxState.ValueType, failure: Failure | None) -> None:
        if sandbox.state == state and sandbox.failure == (failure or Failure()):
            return
        sandbox.state = state
        sandbox.ClearField("failure")
        if failure is not None:
            sandbox.failure.CopyFrom(failure)
        sandbox.state_time.CopyFrom(self.clock.timestamp())

    def _change(self, tx: Tx, sandbox_id: str, change: Callable[[Sandbox], None]) -> bool:
        sandbox = SANDBOXES.take(tx, sandbox_id)
        before = sandbox.SerializeToString(deterministic=True)
        change(sandbox)
        if sandbox.SerializeToString(deterministic=True) == before:
            return False
        self._put(tx, sandbox)
        return True

    def _put(self, tx: Tx, sandbox: Sandbox) -> None:
        sandbox.revision += 1
        SANDBOXES.save(tx, [sandbox])
        self.outbox.mark(tx, [Mark(sandbox.id, sandbox.revision, sandbox)])
