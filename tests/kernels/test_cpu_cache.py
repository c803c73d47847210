"""Where compiled kernels are kept: a folder that can be written, and by nobody else."""

import pytest

from common.engine.kernels.cpu import launch


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))

    def choose(xdg):
        monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
        return launch._cache_folder()

    return choose


def test_the_folder_that_is_asked_for_is_taken_and_the_same_again(cache_folder, tmp_path):
    chosen = cache_folder(tmp_path / "volume")
    assert chosen.is_relative_to(tmp_path / "volume")
    assert chosen.stat().st_mode & 0o777 == 0o700
    assert cache_folder(tmp_path / "volume") == chosen


def test_a_folder_that_cannot_be_made_is_refused_for_the_next_one(cache_folder, tmp_path, capsys):
    (tmp_path / "volume").write_text("a file")
    assert cache_folder(tmp_path / "volume").is_relative_to(tmp_path / "home")
    told = capsys.readouterr().out
    assert "kernel_cache_refused" in told
    assert str(tmp_path / "volume") in told


def test_a_folder_that_others_may_write_to_is_refused_for_the_next_one(
    cache_folder, tmp_path, capsys
):
    for home in ("volume", "home/.cache"):
        chosen = cache_folder(tmp_path / home)
        chosen.parent.chmod(0o777)
    assert cache_folder(tmp_path / "volume").is_relative_to(tmp_path / "tmp")
    assert "mode 0700" in capsys.readouterr().out
