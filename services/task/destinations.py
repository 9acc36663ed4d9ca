"""Where the task's outbox leads, besides up to the repository."""

TO_SANDBOX = "sandbox"
"""Agents to be started, turns, cancellations, answers, and what is to be stopped: to the sandbox service."""

TO_WORKFLOW = "workflow"
"""Durable work of this service itself."""
