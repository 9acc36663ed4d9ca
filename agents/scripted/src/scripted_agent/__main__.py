"""Runs the agent on standard input and output."""

import asyncio

import acp

from scripted_agent.agent import ScriptedAgent


def main() -> None:
    """Serve until standard input ends."""
    asyncio.run(acp.run_agent(ScriptedAgent()))


if __name__ == "__main__":
    main()
