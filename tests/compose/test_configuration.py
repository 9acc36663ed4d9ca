"""What Compose makes of its files, whatever is set: asked of Compose itself, which needs no Engine for it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.compose.installation import DOOR, FILE, compose_program


def configured(*files: Path, **environment: str) -> dict[str, Any]:
    """Return the services as Compose understands files under an environment."""
    named = [word for file in files for word in ("--file", str(file))]
    command = [*compose_program(), "--env-file", os.devnull, *named, "config", "--format", "json"]
    shown = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )
    assert not shown.returncode, shown.stderr
    return json.loads(shown.stdout)["services"]


def test_plaintext_is_published_on_loopback_alone_whatever_is_set() -> None:  # OPS-7
    every_way = configured(FILE, BRANCHLINE_LISTEN="0.0.0.0:7700", BRANCHLINE_NAME="branchline.example.com")
    assert every_way["gateway"]["environment"]["BRANCHLINE_GATEWAY__INSECURE"] == "true"
    ports = [(one["host_ip"], one["published"]) for one in every_way["gateway"]["ports"]]
    assert ports == [("127.0.0.1", "7700")]
    assert [name for name, service in every_way.items() if service.get("ports")] == ["gateway"]


def test_off_loopback_the_gateway_has_a_certificate() -> None:  # OPS-7
    gateway = configured(FILE, DOOR, BRANCHLINE_LISTEN="0.0.0.0:443")["gateway"]
    assert gateway["environment"]["BRANCHLINE_GATEWAY__INSECURE"] == "false"
    assert gateway["environment"]["BRANCHLINE_GATEWAY__CERTIFICATE"] == "/keys/door/tls.crt"
    assert [(one["host_ip"], one["published"]) for one in gateway["ports"]] == [("0.0.0.0", "443")]
