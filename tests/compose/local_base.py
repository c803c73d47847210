"""A base image made on this machine, for containers that can pull nothing and reach no index.

It is what BASE_IMAGE would be (Debian with Python 3.11) plus a wheelhouse and an /etc/pip.conf
that points pip there, so that the product's Dockerfile stays the plain one. Both halves are
kept between runs: the Debian half forever, the wheels until constraints.txt or pyproject.toml
change.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLIC_BASE = "python:3.11-slim-bookworm"
PULL_TIMEOUT_S = 120
SUITE = "bookworm"
DEBIAN_PACKAGES = ("ca-certificates", "python3", "python3-venv")
ROLES = ("gateway", "worker", "kvstore", "observability")
# The tags that pip on Debian bookworm's Python 3.11 accepts; pip does not expand them itself.
PLATFORMS = (
    "manylinux_2_28_{arch}",
    "manylinux_2_17_{arch}",
    "manylinux2014_{arch}",
    "manylinux_2_5_{arch}",
    "manylinux1_{arch}",
    "linux_{arch}",
)
PIP_CONF = "[global]\nno-index = true\nfind-links = /opt/wheelhouse\n"
WHEELHOUSE_DOCKERFILE = """\
ARG DEBIAN
FROM ${DEBIAN}
COPY pip.conf /etc/pip.conf
COPY wheels /opt/wheelhouse
"""


def base_image(docker: str, environ: Mapping[str, str]) -> str:
    """The name of a base image that this machine's daemon has: pulled, else made here."""
    if _has_image(docker, environ, PUBLIC_BASE) or _pull(docker, environ):
        return PUBLIC_BASE
    debian = f"baton-test-debian:{SUITE}"
    if not _has_image(docker, environ, debian):
        _import_debian(docker, environ, debian)
    name = f"baton-test-base:{_wheelhouse_key()}"
    if not _has_image(docker, environ, name):
        old = run([docker, "image", "ls", "-q", "baton-test-base"], environ, 30).split()
        if old:
            run([docker, "image", "rm", "--force", *set(old)], environ, 120)
        _build_with_wheels(docker, environ, debian, name)
    return name


def run(command: list[str], environ: Mapping[str, str], timeout_s: float, cwd: Path = ROOT) -> str:
    """Output of a command; raises RuntimeError with the end of it when it fails."""
    done = subprocess.run(
        command,
        env=dict(environ),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}...: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def _has_image(docker: str, environ: Mapping[str, str], name: str) -> bool:
    found = subprocess.run(
        [docker, "image", "inspect", name], env=dict(environ), capture_output=True, check=False
    )
    return found.returncode == 0


def _pull(docker: str, environ: Mapping[str, str]) -> bool:
    try:
        run([docker, "pull", "--quiet", PUBLIC_BASE], environ, PULL_TIMEOUT_S)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False
    return True


def _import_debian(docker: str, environ: Mapping[str, str], name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="baton-debian-") as folder:
        root = Path(folder, "root")
        packages = ",".join(DEBIAN_PACKAGES)
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE]
        run([*command, str(root), _mirror()], environ, 600)
        shutil.rmtree(root / "var/cache/apt")
        archive = Path(folder, "root.tar")
        run(["tar", "-C", str(root), "-cf", str(archive), "."], environ, 300)
        run([docker, "import", str(archive), name], environ, 300)


def _mirror() -> str:
    """Where this machine's own apt gets Debian from."""
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        origin, codename, uri = [*line.split(), "", "", ""][:3]
        if (origin, codename) == ("Debian", SUITE):
            return uri
    raise RuntimeError(f"apt on this machine lists no source of Debian {SUITE}; add one")


def _wheelhouse_key() -> str:
    parts = ((ROOT / "constraints.txt").read_text(), Path(__file__).read_text(), *_requirements())
    return hashlib.blake2b("\0".join(parts).encode()).hexdigest()[:16]


def _requirements() -> list[str]:
    """What the images install, and what builds Baton's own wheel."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = config["project"]["optional-dependencies"]
    asked = [*config["build-system"]["requires"], *config["project"]["dependencies"]]
    for role in ROLES:
        asked += extras[role]
    return asked


def _build_with_wheels(docker: str, environ: Mapping[str, str], debian: str, name: str) -> None:
    arch = os.uname().machine
    with tempfile.TemporaryDirectory(prefix="baton-wheels-") as folder:
        context = Path(folder)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        command += ["--dest", str(context / "wheels"), "-c", "constraints.txt"]
        # Named, because the interpreter that runs this test may be 3.12.
        command += ["--python-version=3.11", "--implementation=cp"]
        command += [f"--abi={abi}" for abi in ("cp311", "abi3", "none")]
        command += [f"--platform={p.format(arch=arch)}" for p in PLATFORMS]
        run([*command, *_requirements()], environ, 600)
        (context / "pip.conf").write_text(PIP_CONF)
        (context / "Dockerfile").write_text(WHEELHOUSE_DOCKERFILE)
        build = [docker, "build", "--build-arg", f"DEBIAN={debian}", "-t", name, "."]
        run(build, environ, 600, cwd=context)
