"""Every service can be imported as `branchline serve` runs it, with the command line's modules out of the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from cli.installation import GATEWAY, SERVICES


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_imported_as_it_is_served(service: str, tmp_path: Path) -> None:  # OPS-2
    room = GATEWAY if service == GATEWAY else f"services.{service}"
    program = f"""
import runpy, sys
sys.argv = ["cli.server", {service!r}, {str(tmp_path)!r}]
try:
    runpy.run_module("cli.server", run_name="__main__")
except SystemExit:
    pass  # it has no settings; what matters is what is kept from its process
import {room}.service
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
