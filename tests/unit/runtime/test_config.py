"""How settings become a typed configuration, and what is said of those that mean nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.runtime.config import Config, Secret, make_private, read_config


class Part(Config, frozen=True):
    """Settings of a part."""

    seconds: float = 1.0
    key: Secret = Secret("")
    folders: Sequence[Path] = ()


class Whole(Config, frozen=True, kw_only=True):
    """Settings of all."""

    name: str
    part: Part = Part()
    agents: Mapping[str, Sequence[str]] = {}
    loud: bool = False


def test_texts_of_the_environment_become_what_they_stand_for() -> None:
    part = {"seconds": "2.5", "key": "secret", "folders": ["/srv", Path("/opt")]}

    whole = read_config(Whole, {"name": "one", "part": part, "agents": {"mock": ["run"]}, "loud": "true"})

    assert whole == Whole(
        name="one",
        part=Part(seconds=2.5, key=Secret("secret"), folders=[Path("/srv"), Path("/opt")]),
        agents={"mock": ["run"]},
        loud=True,
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "name"),
        ({"name": "one", "nane": "two"}, "nane"),
        ({"name": "one", "part": {"secondss": 1}}, "secondss"),
        ({"name": "one", "part": {"seconds": "a secret"}}, "seconds"),
        ({"name": "one", "part": {"key": ["a secret"]}}, "key"),
        ({"name": "one", "part": {"folders": "a secret"}}, "folders"),
        ({"name": "one", "loud": "a secret"}, "loud"),
    ],
)
def test_a_setting_that_means_nothing_is_named_without_its_value(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        read_config(Whole, given)

    assert "a secret" not in str(refused.value)


def test_a_secret_is_not_shown_with_what_holds_it() -> None:
    whole = read_config(Whole, {"name": "one", "part": {"key": "a secret"}})

    assert "a secret" not in f"{whole} {whole!r} {whole.part.key}"
    assert whole.part.key.value == "a secret"


def test_a_private_folder_is_made_in_no_folder_that_others_may_enter(tmp_path: Path) -> None:  # F14
    make_private(tmp_path / "organization" / "blobs")

    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.rglob("*"))] == [0o700, 0o700]
