"""`${NAME}` in a setting: the environment's variable, or the text of the file that NAME_FILE names."""

from pathlib import Path

import pytest
from sqlalchemy import make_url

from limaml.config.secret import is_named, revealed, revealed_url
from limaml.errors import ConfigError

ANY_TEXT = 'p@ss:w/rd#1%, "q" ${x} пароль'


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOME_SECRET", "SOME_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_the_variable_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(f"{ANY_TEXT}\n")
    monkeypatch.setenv("SOME_SECRET_FILE", str(tmp_path / "secret"))
    assert revealed("${SOME_SECRET}", "a.key") == ANY_TEXT
    monkeypatch.setenv("SOME_SECRET", "of the environment")
    assert revealed("${SOME_SECRET}", "a.key") == "of the environment"


def test_a_url_holds_it_percent_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", ANY_TEXT)
    url = make_url(revealed_url("postgresql://me:${SOME_SECRET}@host:5432/db", "a.key"))
    assert (url.password, url.host, url.database) == (ANY_TEXT, "host", "db")
    assert revealed_url("sqlite:///plain.db", "a.key") == "sqlite:///plain.db"


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"a\.key refers to \$\{SOME_SECRET\}, which is not in .* SOME_SECRET_FILE to the path"
    ):
        revealed("${SOME_SECRET}", "a.key")
    monkeypatch.setenv("SOME_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"SOME_SECRET_FILE = .*none is unreadable"):
        revealed("${SOME_SECRET}", "a.key")


@pytest.mark.parametrize(("text", "named"), [("${A_1}", True), ("a${A}", False), ("${1A}", False), ("", False)])
def test_a_name_is_one_and_nothing_else(text: str, named: bool) -> None:
    assert is_named(text) is named
