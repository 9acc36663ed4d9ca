"""The Docker Engine that tests of Docker sandboxes need: never skipped, told with words where it is missing."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SANDBOX_IMAGE = "branchline-sandbox"
DOCKER = ("docker",)
_START_SECONDS = 60.0


def docker(*arguments: str, check: bool = True) -> str:
    """Run Docker's command line; return what it prints."""
    ran = subprocess.run([*DOCKER, *arguments], capture_output=True, text=True, check=False, timeout=600)
    if check and ran.returncode:
        raise AssertionError(f"docker {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout.strip()


@contextmanager
def running_engine() -> Generator[None, None, None]:
    """Have an Engine for the length of the block: the one that runs, or one that is installed and started here."""
    assert shutil.which("docker"), "these tests need Docker (Debian: apt-get install docker.io)"
    if _answers():
        yield
        return
    assert shutil.which("dockerd"), "these tests need a Docker Engine that runs, or dockerd (Debian: docker.io)"
    assert os.geteuid() == 0, "no Docker Engine answers, and only root can start dockerd"
    with tempfile.TemporaryDirectory(prefix="dockerd-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            engine = subprocess.Popen(["dockerd"], stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers():
                words = f"dockerd does not start: {log.read_text()[-2000:]}"
                assert engine.poll() is None, words
                assert time.monotonic() < deadline, words
                time.sleep(0.2)
            yield
        finally:
            engine.terminate()
            engine.wait(_START_SECONDS)


def _answers() -> bool:
    return not subprocess.run([*DOCKER, "version"], capture_output=True, check=False).returncode


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
        raise AssertionError(f"these tests need the image {SANDBOX_IMAGE}: make images")
