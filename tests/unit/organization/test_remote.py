"""URLs of repositories. REP-1."""

import pytest

from services.organization.remote import check_remote_url, name_from_url
from services.runtime.errors import InvalidArgument
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


@pytest.mark.parametrize(
    "url",
    [
        "-oProxyCommand=id@h:x",
        "-x@h:x",
        "git@-x:y",
        "git@h:--upload-pack=id",
        "ssh://-oProxyCommand=id/x",
        "ssh://git@-oProxyCommand=id/x",
        "ext::sh",
        "https://:@h/x",
        "https://@h/x",
        "https://h/x?token=s3cr3t",
        "https://h/x#s3cr3t",
        "https://h:99999/x",
        "https://h/../x",
        "https://h\u202ex/y",
        "file://host/x",
    ],
)
def test_what_git_would_misread_or_what_may_hold_a_secret_is_no_url(url: str) -> None:  # bad input
    with pytest.raises(InvalidArgument) as refused:
        check_remote_url(url)

    assert [field for field, _ in refused.value.violations] == ["remote_url"]
    assert "s3cr3t" not in refused.value.message
