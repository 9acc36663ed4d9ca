"""What a sandbox's home is furnished with, whoever makes the machine: git's settings, and launchers of agents."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

ACP_TIMEOUT_MS = str(24 * 3600 * 1000)

_LAUNCHER = """#!/bin/sh
# Runs an agent, marks what it starts, and says on the agent's own channel when it ends, which the server would not.
export BRANCHLINE_AGENT=$$
{command} "$@"
code=$?
printf '{{"jsonrpc":"2.0","method":"_branchline/agent_exited","params":{{"code":%d}}}}\\n' "$code"
exit "$code"
"""

_GITCONFIG = """[credential]
	helper = store --file ~/.git-credentials
[safe]
	directory = *
[init]
	defaultBranch = main
[push]
	autoSetupRemote = true
[advice]
	detachedHead = false
"""


def furniture(home: PurePath, agents: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, int]]:
    """Return the files of a home with their modes. `agents` are command lines by name."""
    launchers = home / ".local/share/sandbox-agent/bin/agent_processes"
    made = {
        str(launchers / f"{agent}-acp"): (_LAUNCHER.format(command=shlex.join(command)), 0o755)
        for agent, command in agents.items()
    }
    return {str(home / ".gitconfig"): (_GITCONFIG, 0o644), **made}


def environment(home: PurePath, path: str) -> dict[str, str]:
    """Return the variables that every sandbox's server has."""
    return {
        "HOME": str(home),
        "PATH": path,
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "GIT_TERMINAL_PROMPT": "0",
        "SANDBOX_AGENT_ACP_REQUEST_TIMEOUT_MS": ACP_TIMEOUT_MS,
    }
