"""Images that anybody builds: from a bare base, small, without a trace of where they were built."""

import json
import os
import secrets
import subprocess
import time
from pathlib import Path

import pytest

from cli.installation import ROOT, SERVICES
from tests.support.engine import docker

MOST_BYTES = 300_000_000
FOLDER = ROOT / "deploy" / "docker"

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("images")]


def inside(image: str, script: str) -> str:
    return docker("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", image, "-c", script)


def test_the_base_has_nothing_that_the_images_need_from_packages() -> None:  # OPS-2
    files = ("Dockerfile", "sandbox.Dockerfile")
    words = " ".join((FOLDER / file).read_text().replace("\\\n", " ") for file in files).split("apt-get install")[1:]
    wanted = {word for part in words for word in part.partition("&&")[0].split() if not word.startswith("-")}
    wanted = {word for word in wanted if word.replace("-", "").isalnum() and word != "RUN"} - {"#", "COPY", "ARG"}
    found = inside("debian:bookworm-slim", "dpkg-query --show --showformat '${Package}\\n'").split()
    print(f"the base has {len(found)} packages: {' '.join(found)}")  # noqa: T201
    assert "python3" in wanted
    assert not wanted & set(found)


def test_the_image_is_small_and_says_what_it_is() -> None:  # OPS-2
    (image,) = json.loads(docker("inspect", "branchline:latest"))
    print(f"branchline {image['Size'] / 1e6:.0f} MB")  # noqa: T201
    assert image["Size"] < MOST_BYTES
    assert image["Config"]["User"] == "10001:10001"
    labels = {f"org.opencontainers.image.{name}" for name in ("title", "licenses", "version", "revision")}
    assert labels <= image["Config"]["Labels"].keys()


@pytest.mark.parametrize("image", ["branchline", "branchline-sandbox"])
def test_nothing_of_the_builder_is_left_in_an_image(image: str) -> None:  # OPS-2
    (found,) = json.loads(docker("inspect", f"{image}:latest"))
    said = json.dumps(found["Config"]) + docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert "ca.crt" not in said
    bundle = os.environ.get("PIP_CERT")
    own = Path(bundle).read_text().split("-----BEGIN CERTIFICATE-----")[1:] if bundle else []
    trusted = inside(image, "cat /etc/ssl/certs/ca-certificates.crt")
    debian = inside(image, "cat /usr/share/ca-certificates/mozilla/*.crt")
    for certificate in trusted.split("-----BEGIN CERTIFICATE-----")[1:]:
        assert certificate.strip() in debian
    assert not [one for one in own if one.strip() not in debian and one.strip() in trusted]
    assert not inside(image, "find / -xdev -name ca.crt -o -xdev -name '*.lock' -path '/build/*'")


def test_every_service_serves_on_a_read_only_root_without_a_right() -> None:  # OPS-2
    places = {name: f"127.0.0.1:{7700 + number}" for number, name in enumerate(SERVICES)}
    given = {
        "BRANCHLINE_SIGNING_KEY": secrets.token_urlsafe(),
        "BRANCHLINE_SANDBOX__PROVIDER": "docker",
        **{f"BRANCHLINE_ADDRESSES__{name.upper()}": place for name, place in places.items()},
    }
    settings = [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
    rights = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")
    running: dict[str, str] = {}
    try:
        for name in SERVICES:
            options = ("--detach", "--network", "none", *rights, *settings)
            running[name] = docker("run", *options, "branchline", "serve", name)
        for name, container in running.items():
            until_serving(name, container)
    finally:
        docker("rm", "--force", "--volumes", *running.values())


def until_serving(name: str, container: str) -> None:
    """Wait until a service answers its health check; fail with what it said where it ended."""
    deadline = time.monotonic() + 120
    asked = ["docker", "exec", container, "python", "-m", "cli.health", name]
    while subprocess.run(asked, capture_output=True, check=False).returncode:
        running = docker("inspect", "--format", "{{.State.Running}}", container) == "true"
        said = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=False)
        assert running, said.stdout + said.stderr
        assert time.monotonic() < deadline, said.stdout + said.stderr
        time.sleep(0.3)
