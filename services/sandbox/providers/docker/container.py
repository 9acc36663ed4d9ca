"""What a sandbox's container is made of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.sandbox.providers import launcher
from services.sandbox.providers.docker.config import HOME, DockerProviderConfig
from services.sandbox.providers.docker.engine import Json
from services.sandbox.providers.docker.networks import Network
from services.sandbox.providers.furniture import environment, furniture

PORT = 2468
"""Of the sandbox-agent server."""

_PATH = "/opt/node/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 8192}
_UMASK = 0o022
_SERVER = ["sandbox-agent", "server", "--no-telemetry", "--token", launcher.HIDDEN, "--host", "0.0.0.0"]
_TMPFS = "rw,exec,nosuid,nodev,mode=1777,size={size}m"
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tokens:
    """Secrets of one sandbox."""

    server: str
    """Bearer token of its server."""

    door: str
    """What it shows the door."""


def config(
    given: DockerProviderConfig,
    name: str,
    sandbox_id: str,
    network: Network,
    door: tuple[str, int],
    tokens: Tokens,
    labels: Mapping[str, str],
) -> Json:
    """Return the configuration of a container. `door` is the address and port of the door in its network."""
    server = [*_SERVER, "--port", str(PORT)]
    plan = launcher.plan(
        home=str(HOME),
        files=furniture(HOME, given.agents),
        command=server,
        token=tokens.server,
        limits=_LIMITS,
        umask=_UMASK,
        user=None,
    )
    proxy = f"http://{sandbox_id}:{tokens.door}@door:{door[1]}"
    variables = {
        **environment(HOME, _PATH),
        **{variable: proxy for name in ("http_proxy", "https_proxy") for variable in (name, name.upper())},
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1,door"),
        "BRANCHLINE_DOOR": f"http://door:{door[1]}",
        "BRANCHLINE_DOOR_TOKEN": tokens.door,
        **given.environment,
        launcher.PLAN: plan.decode(),
    }
    memory = given.memory_mib * _MIB
    return {
        "Image": given.image,
        "Hostname": "sandbox",
        "Entrypoint": [],
        "Cmd": ["python3", "-I", "-S", "-c", Path(launcher.__file__).read_text()],
        "Env": [f"{variable}={value}" for variable, value in variables.items()],
        "WorkingDir": str(HOME),
        "Labels": dict(labels),
        "HostConfig": {
            "Init": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": given.read_only,
            "Tmpfs": {
                "/tmp": _TMPFS.format(size=given.temporary_mib),  # noqa: S108 - the sandbox's own
                "/var/tmp": _TMPFS.format(size=given.temporary_mib),  # noqa: S108
                "/run": _TMPFS.format(size=16),
            },
            "Mounts": [
                {
                    "Type": "volume",
                    "Source": name,
                    "Target": str(HOME),
                    "VolumeOptions": {"Labels": dict(labels)},
                },
                *({"Type": "bind", "Source": path, "Target": path} for path in given.binds),
            ],
            "Memory": memory,
            "MemorySwap": memory,
            "NanoCpus": round(given.cpus * 1e9),
            "PidsLimit": given.processes,
            "OomScoreAdj": 500,
            "NetworkMode": network.name,
            # Nobody answers there: Docker would otherwise ask the host's name servers for whatever a sandbox says.
            "Dns": [door[0]],
            "DnsOptions": ["timeout:1", "attempts:1"],
            "ExtraHosts": [f"door:{door[0]}"],
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
        },
        "NetworkingConfig": {"EndpointsConfig": {network.name: {"IPAMConfig": {"IPv4Address": network.sandbox}}}},
    }


def digest(made: Json) -> str:
    """Return a short text that is the same for the same configuration."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
