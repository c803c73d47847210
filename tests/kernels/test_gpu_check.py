"""`make gpu-check` without a GPU: it says so, and its own lines run in Triton's interpreter."""

import argparse
import os
import subprocess
import sys

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.__main__ import SECTIONS, Process, Section, run_section

OPTIONS = argparse.Namespace(device="cpu", tiny=True)
# What the engine's other parts need and a GPU machine may lack.
ABSENT = ("structlog", "pydantic", "grpc_health", "grpc_status", "opentelemetry", "openai")
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def gpu_check(*arguments, path=""):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(path), environment.get("PYTHONPATH", "")))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    line = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280)


def test_a_machine_without_a_cuda_device_is_told_so():
    run = gpu_check()
    assert run.returncode == 2
    assert "no CUDA device" in run.stdout


def test_every_section_runs_with_the_packages_of_a_gpu_machine(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(absent=ABSENT))
    run = gpu_check("--device", "cpu", "--tiny", path=tmp_path)
    print(run.stdout, run.stderr)
    assert run.returncode == 0
    assert "FAILED" not in run.stdout
    assert "5 sections, all right" in run.stdout
    served, peer = run.stdout.split("== serving")[1].split("== transformers")
    assert served.count("output tokens/s") == peer.count("output tokens/s") == 2


def test_without_transformers_there_is_nothing_to_compare_with(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(absent=("transformers",)))
    run = gpu_check("--device", "cpu", "--tiny", "--section", "transformers", path=tmp_path)
    assert run.returncode == 0
    assert "transformers is not installed" in run.stdout


def test_the_sections_together_may_take_less_than_eight_minutes():
    assert sum(section.limit_s for section in SECTIONS.values()) < 480


def test_what_is_over_its_time_is_stopped_and_leaves_nothing_behind(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SECTIONS, "gemm", Section(0.1, ("gemm:run",)))
    monkeypatch.setattr(command, "place", lambda: str(tmp_path))
    assert not run_section("gemm", ["gemm"], OPTIONS)
    assert "gemm:run: over its 0 s: stopped" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_kernels_are_compiled_by_doing_once_what_is_timed():
    process = Process("gemm:run", OPTIONS, 100, compiling=True)
    assert process.end()
