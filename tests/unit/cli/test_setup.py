"""The keys of services that run apart: made once, in files that their owner alone can read."""

from pathlib import Path

from cli.commands.setup import make_keys


def _files(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_keys_are_made_once_and_only_their_owner_reaches_them(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    made = _files(tmp_path / "keys")
    make_keys(tmp_path / "keys")
    assert _files(tmp_path / "keys") == made
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    assert len({text for path, text in made.items() if path.name == "signing.key"}) == 1
    assert len({text for path, text in made.items() if path.name == "database.password"}) == 7


def test_a_key_that_one_service_lost_is_the_others_again(tmp_path: Path) -> None:
    make_keys(tmp_path)
    lost = tmp_path / "task" / "signing.key"
    before = lost.read_text()
    lost.unlink()
    make_keys(tmp_path)
    assert lost.read_text() == before
