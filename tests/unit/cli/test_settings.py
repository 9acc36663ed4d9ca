"""Settings that a variable names a file for."""

from pathlib import Path

import pytest

from cli.settings import SettingsError, load_settings


def _secret_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_variable_may_name_the_file_that_holds_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int
) -> None:
    monkeypatch.setenv("BRANCHLINE_SIGNING_KEY_FILE", str(_secret_file(tmp_path, "a key of a file\n", mode)))
    assert load_settings().signing_key.value == "a key of a file"


def test_a_file_gives_a_services_own_setting_too_and_is_a_text_whatever_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BRANCHLINE_GITHUB_DATA__GITHUB_TOKEN_FILE", str(_secret_file(tmp_path, "[token")))
    assert load_settings().section("github_data") == {"github_token": "[token"}


def test_a_secret_that_others_can_read_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = _secret_file(tmp_path, "a key of a file", 0o644)
    monkeypatch.setenv("BRANCHLINE_SIGNING_KEY_FILE", str(path))
    with pytest.raises(SettingsError, match=f"BRANCHLINE_SIGNING_KEY_FILE: {path} .*: chmod 600 {path}"):
        load_settings()


@pytest.mark.parametrize("text", ["", "\n", None])
def test_a_secret_that_is_not_there_is_an_error_and_not_an_empty_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "nothing" if text is None else _secret_file(tmp_path, text)
    monkeypatch.setenv("BRANCHLINE_SIGNING_KEY_FILE", str(path))
    with pytest.raises(SettingsError, match=f"BRANCHLINE_SIGNING_KEY_FILE: {path}"):
        load_settings()


def test_a_setting_given_both_ways_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRANCHLINE_SIGNING_KEY", "one")
    monkeypatch.setenv("BRANCHLINE_SIGNING_KEY_FILE", str(_secret_file(tmp_path, "other")))
    with pytest.raises(ValueError, match="BRANCHLINE_SIGNING_KEY is set twice"):
        load_settings()


def test_a_file_for_what_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANCHLINE_NOTHING_FILE", "/nowhere")
    with pytest.raises(ValueError, match="BRANCHLINE_NOTHING_FILE is not a setting"):
        load_settings()
