"""Settings of the `docker` provider that mean nothing, or would take a sandbox apart, are refused."""

import pytest

from services.sandbox.providers.docker.config import DockerProviderConfig


@pytest.mark.parametrize(
    "bind",
    ["demo.git", "/tmp/../etc", "/tmp/demo.git/", "/", "/home", "/home/sandbox/x", "/var/run/docker.sock", "/proc/1"],
)
def test_a_bind_is_a_plain_path_that_hides_nothing_of_the_sandbox(bind: str) -> None:
    with pytest.raises(ValueError, match="binds: "):
        DockerProviderConfig(binds=[bind])


def test_a_folder_of_the_host_may_be_bound() -> None:
    assert DockerProviderConfig(binds=["/tmp/demo.git", "/srv/git"]).binds == ["/tmp/demo.git", "/srv/git"]
