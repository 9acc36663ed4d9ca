"""The Docker Engine that tests of Docker sandboxes need: never skipped, told with words where it is missing."""

import subprocess
from functools import cache

SANDBOX_IMAGE = "branchline-sandbox"
DOCKER = ("docker",)


def docker(*arguments: str, check: bool = True) -> str:
    """Run Docker's command line; return what it prints."""
    ran = subprocess.run([*DOCKER, *arguments], capture_output=True, text=True, check=False, timeout=120)
    if check and ran.returncode:
        raise AssertionError(f"docker {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout.strip()


@cache
def require_engine() -> None:
    """Fail with words unless there is an Engine with the image of sandboxes."""
    try:
        docker("version", "--format", "{{.Server.Version}}")
    except FileNotFoundError:
        raise AssertionError("these tests need Docker (Debian: apt-get install docker.io)") from None
    except AssertionError as error:
        raise AssertionError(f"these tests need a Docker Engine that runs: start dockerd ({error})") from None
    if not docker("images", "--quiet", SANDBOX_IMAGE):
        raise AssertionError(f"these tests need the image {SANDBOX_IMAGE}: make sandbox-image")
