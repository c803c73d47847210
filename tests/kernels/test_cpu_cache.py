"""Where compiled kernels are kept: a folder that can be written, and by nobody else."""

import pytest
from structlog.testing import capture_logs

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


def test_a_folder_that_cannot_be_made_is_refused_for_the_next_one(cache_folder, tmp_path):
    (tmp_path / "volume").write_text("a file")
    with capture_logs() as logs:
        assert cache_folder(tmp_path / "volume").is_relative_to(tmp_path / "home")
    assert [entry["event"] for entry in logs] == ["kernel_cache_refused"]
    assert logs[0]["folder"].startswith(str(tmp_path / "volume"))


def test_a_folder_that_others_may_write_to_is_refused_for_the_next_one(cache_folder, tmp_path):
    for home in ("volume", "home/.cache"):
        chosen = cache_folder(tmp_path / home)
        chosen.parent.chmod(0o777)
    with capture_logs() as logs:
        assert cache_folder(tmp_path / "volume").is_relative_to(tmp_path / "tmp")
    assert len(logs) == 2
    assert all("mode 0700" in entry["reason"] for entry in logs)
