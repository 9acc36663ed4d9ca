"""Queries about sandboxes. Each change bumps the revision and marks the sandbox for the task."""

from collections.abc import Callable
from dataclasses import dataclass

from branchline.v1.sandboxes_pb2 import (
    SANDBOX_STATUS_DESTROYED,
    SANDBOX_STATUS_DESTROYING,
    SANDBOX_STATUS_RUNNING,
    Sandbox,
    SandboxStatus,
)
from branchline.v1.vocabulary_pb2 import ENTITY_KIND_SANDBOX, ERROR_REASON_SANDBOX_GONE
from sqlalchemy import bindparam, select, update

from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx
from services.runtime.errors import FailedPrecondition
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.sandbox.tables import sandboxes

GONE = (SANDBOX_STATUS_DESTROYING, SANDBOX_STATUS_DESTROYED)

SANDBOXES = Resources(
    sandboxes,
    Sandbox,
    ENTITY_KIND_SANDBOX,
    lambda sandbox: {"id": sandbox.id, "task_id": sandbox.task_id, "status": sandbox.status},
    own=("organization_id",),
)
_THERE = SANDBOXES.by(where=[sandboxes.c.status != SANDBOX_STATUS_DESTROYED])
_DESTROYED = Statement(select(sandboxes.c.id).where(sandboxes.c.status == SANDBOX_STATUS_DESTROYED))
_ACTIVE = Statement(
    select(sandboxes.c.payload)
    .where(
        sandboxes.c.task_id == bindparam("task"),
        sandboxes.c.organization_id == bindparam("organization"),
        sandboxes.c.status != SANDBOX_STATUS_DESTROYING,
        sandboxes.c.status != SANDBOX_STATUS_DESTROYED,
    )
    .order_by(sandboxes.c.id.desc())
    .limit(1)
)
_PLACE = Statement(
    update(sandboxes).where(sandboxes.c.id == bindparam("sandbox")).values(organization_id=bindparam("organization"))
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
        if sandbox.status in GONE:
            raise FailedPrecondition(ERROR_REASON_SANDBOX_GONE, f"the sandbox {sandbox_id} is destroyed")
        return sandbox

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

    def add(self, tx: Tx, sandbox: Sandbox, organization_id: str) -> None:
        """Store a new sandbox; leave one that is there, whatever its state."""
        if SANDBOXES.find(tx, sandbox.id) is None:
            self._put(tx, sandbox)
            tx.change(_PLACE, {"sandbox": sandbox.id, "organization": organization_id})

    def bury(self, tx: Tx, sandbox_id: str) -> bool:
        """Note that a sandbox is gone before it was made, so that a creation on its way is refused.

        Return False if it was made.
        """
        if SANDBOXES.find(tx, sandbox_id) is not None:
            return False
        return SANDBOXES.put(tx, Sandbox(id=sandbox_id, status=SANDBOX_STATUS_DESTROYED, revision=1))

    def started(self, tx: Tx, sandbox_id: str, isolation: str, workspace: str) -> None:
        """Note that a machine runs. Raise FailedPrecondition if it is destroyed meanwhile."""
        self.present(tx, sandbox_id)

        def change(sandbox: Sandbox) -> None:
            sandbox.isolation = isolation
            sandbox.workspace = workspace
            self._stand(sandbox, SANDBOX_STATUS_RUNNING, "")

        self._change(tx, sandbox_id, change)

    def move(self, tx: Tx, sandbox_id: str, status: SandboxStatus.ValueType, reason: str = "") -> bool:
        """Change where a sandbox stands; return False where it does not.

        One that is being destroyed will only be destroyed.
        """

        def change(sandbox: Sandbox) -> None:
            if sandbox.status == SANDBOX_STATUS_DESTROYED:
                return
            if sandbox.status == SANDBOX_STATUS_DESTROYING and status != SANDBOX_STATUS_DESTROYED:
                return
            self._stand(sandbox, status, reason)

        return self._change(tx, sandbox_id, change)

    def _stand(self, sandbox: Sandbox, status: SandboxStatus.ValueType, reason: str) -> None:
        if (sandbox.status, sandbox.status_reason) != (status, reason):
            sandbox.status = status
            sandbox.status_reason = reason
            sandbox.status_time.CopyFrom(self.clock.timestamp())

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
