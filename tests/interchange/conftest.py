"""A target and its texts, for the tests of hidden states that other projects dumped."""

from pathlib import Path

import pytest
from dump_toys import COUNT, Text, answered_texts, write_normed_target


@pytest.fixture(scope="session")
def normed_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of eight layers."""
    return write_normed_target(tmp_path_factory.mktemp("dumps") / "target")


@pytest.fixture(scope="session")
def texts(normed_target: Path) -> list[Text]:
    """Texts as the target answers them, with its states."""
    return answered_texts(normed_target, COUNT)


@pytest.fixture
def folder(normed_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder beside the target, in which a test runs."""
    (tmp_path / "target").symlink_to(normed_target)
    monkeypatch.chdir(tmp_path)
    return tmp_path
