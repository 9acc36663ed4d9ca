"""Images that anybody builds: from a bare base, small, without a trace of where they were built."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from cli.installation import ROOT
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


def test_every_service_starts_on_a_read_only_root_without_a_right(tmp_path: Path) -> None:  # OPS-2
    ran = subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            "--read-only",
            "--cap-drop",
            "ALL",
            "--network",
            "none",
            "branchline",
            "serve",
            "nothing",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'there is no service "nothing"' in ran.stderr
