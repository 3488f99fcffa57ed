"""Which kinds of destination there are: ours, and those that other packages bring."""

import subprocess
import sys
from pathlib import Path

import pytest

from connectors import Kind, kinds


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that brings connectors."""
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "theirs-1.0.dist-info/entry_points.txt").write_text(
        "[sluicegate.connectors]\npigeon = pigeon_post:KIND\nbroken = no_such_module:KIND\nwrong = sys:path\nhttp = pigeon_post:KIND\n"
    )
    (tmp_path / "pigeon_post.py").write_text(
        "from connectors import Kind\nfrom connectors.settings import Settings\n"
        "KIND = Kind(name='pigeon', settings=Settings, connect=None)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_ours_are_there() -> None:
    for name in ("http", "odoo"):
        assert kinds()[name].name == name


@pytest.mark.usefixtures("package")
def test_another_package_brings_a_kind_by_an_entry_point() -> None:
    assert isinstance(kinds()["pigeon"], Kind)
    assert set(kinds()) >= {"http", "odoo", "pigeon"}


@pytest.mark.usefixtures("package")
def test_ours_cannot_be_replaced_by_another_package() -> None:
    assert kinds()["http"].name == "http"


@pytest.mark.usefixtures("package")
def test_what_is_no_kind_says_so_and_harms_only_who_names_it() -> None:
    with pytest.raises(TypeError, match='"wrong"'):
        kinds()["wrong"]
    with pytest.raises(ModuleNotFoundError):
        kinds()["broken"]
    with pytest.raises(KeyError):
        kinds()["never-heard-of"]
    assert "broken" in kinds()


def test_an_installed_package_runs_no_code_until_it_is_named(package: Path) -> None:
    asked = (
        "import sys; from connectors import kinds; list(kinds()); kinds()['http']; print('pigeon_post' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r}); {asked}"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "False"
