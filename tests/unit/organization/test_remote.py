"""URLs of repositories. REP-1."""

import pytest

from services.organization.remote import check_remote_url, name_from_url
from services.runtime.remote import host_of


@pytest.mark.parametrize(
    ("url", "name", "host"),
    [
        ("https://github.com/acme/shop.git", "acme/shop", "github.com"),
        ("git@github.com:acme/shop.git", "acme/shop", "github.com"),
        ("ssh://git@host:2222/acme/shop", "acme/shop", "host:2222"),
        ("file:///srv/git/shop.git", "shop", ""),
        ("http://localhost:8080/shop.git", "shop", "localhost:8080"),
    ],
)
def test_a_url_gives_name_and_host(url: str, name: str, host: str) -> None:
    check_remote_url(url)

    assert (name_from_url(url), host_of(url)) == (name, host)
