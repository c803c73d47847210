"""A container engine for the test: Debian's packages, and a daemon where none runs."""

import contextlib
import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Debian's own commands, whatever else is first on PATH.
DOCKER = "/usr/bin/docker"
COMPOSE = "/usr/bin/docker-compose"
DOCKERD = "/usr/sbin/dockerd"
PACKAGES = {
    DOCKER: "docker.io",
    DOCKERD: "docker.io",
    COMPOSE: "docker-compose",
    "/usr/sbin/debootstrap": "debootstrap",
}
# Kept between runs, so that only the first one builds everything.
CACHE = Path(os.environ.get("BATON_TEST_CACHE", Path.home() / ".cache" / "baton"))
# What the builder may keep of old builds: one build of the four images takes about 3 GB.
KEPT_BUILDS = "6GB"
START_S = 60.0
STOP_S = 60.0


def install() -> None:
    """Install what is missing of PACKAGES with apt. Raises RuntimeError saying what failed."""
    missing = sorted({pkg for path, pkg in PACKAGES.items() if not Path(path).exists()})
    if not missing:
        return
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, "iptables"],
    ):
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=600, check=False
        )
    if done.returncode:
        raise RuntimeError(
            f"tests/compose needs {', '.join(missing)}; installing them failed (run as root on "
            f"Debian, or install them first):\n{done.stderr or done.stdout}"
        )


@contextlib.contextmanager
def running_engine() -> Iterator[dict[str, str]]:
    """The environment in which `docker` reaches a daemon; one is started and stopped if needed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "COMPOSE_"))}
    environ["PATH"] = f"/usr/sbin:/usr/bin:/sbin:/bin:{environ.get('PATH', '')}"
    environ |= {
        "DOCKER_BUILDKIT": "1",
        "COMPOSE_DOCKER_CLI_BUILD": "1",
        "BUILDKIT_PROGRESS": "plain",
    }
    given = os.environ.get("DOCKER_HOST")
    if given:
        environ["DOCKER_HOST"] = given
    if _answers(environ):
        yield environ
        return
    with _only_user_of(CACHE), tempfile.TemporaryDirectory(prefix="baton-docker-") as folder:
        environ["DOCKER_HOST"] = f"unix://{folder}/docker.sock"
        daemon = _start_daemon(Path(folder), environ)
        try:
            yield environ
            # Of a daemon of our own alone: somebody else's builds are not ours to throw away.
            prune = [DOCKER, "builder", "prune", "--force", "--keep-storage", KEPT_BUILDS]
            subprocess.run(prune, env=environ, capture_output=True, timeout=600, check=True)
        finally:
            daemon.terminate()
            try:
                daemon.wait(STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def _only_user_of(folder: Path) -> Iterator[None]:
    """Two daemons must not share their data: whoever comes second waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _answers(environ: dict[str, str]) -> bool:
    asked = subprocess.run(
        [DOCKER, "version", "--format", "{{.Server.Version}}"],
        env=environ,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return asked.returncode == 0


def _start_daemon(folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    log = folder / "dockerd.log"
    command = [
        # It ends with this process, also when that is killed.
        *("setpriv", "--pdeathsig=TERM"),
        DOCKERD,
        f"--host={environ['DOCKER_HOST']}",
        f"--data-root={CACHE / 'docker'}",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/docker.pid",
    ]
    with log.open("wb") as out:
        daemon = subprocess.Popen(command, env=environ, stdout=out, stderr=out)
    deadline = time.monotonic() + START_S
    while not _answers(environ):
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            daemon.wait()
            raise RuntimeError(f"dockerd did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)  # dockerd does not tell when it answers
    return daemon
