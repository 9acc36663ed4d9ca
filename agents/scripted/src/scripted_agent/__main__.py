"""Runs the agent on standard input and output."""

import asyncio

import acp

from scripted_agent.agent import ScriptedAgent


def main() -> None:
    """Serve until standard input ends."""
    agent = ScriptedAgent()  # pyright: ignore[reportAbstractUsage] - what it cannot do it does not announce
    asyncio.run(acp.run_agent(agent))


if __name__ == "__main__":
    main()
