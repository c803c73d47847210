"""compose.yaml for real: images built, the mesh up, scaled, asked, stopped."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai
import pytest

from baton.cli.ports import any_free
from tests.compose.engine import COMPOSE, DOCKER, install, running_engine
from tests.compose.local_base import ROOT, base_image, run

PROJECT = "batontest"
ROLES = ("gateway", "prefill", "decode", "kvstore")
USER = "10001:10001"
QUESTION = "codes: river=4821 stone=7733. What is the code of river?"
ANSWER = "4821"
FOUND_WITHIN_S = 5.0
READY_S = 180.0

# Everything of the first run is in one fixture: packages, the base image, four images.
pytestmark = pytest.mark.timeout(900)


class Mesh:
    """The mesh under docker-compose."""

    def __init__(self, environ: dict[str, str], http_port: int, grpc_port: int) -> None:
        self.environ = environ | {
            "BATON_HTTP_PORT": str(http_port),
            "BATON_GRPC_PORT": str(grpc_port),
            "BATON_TAG": "test",
        }
        self.url = f"http://127.0.0.1:{http_port}"
        self.grpc_address = f"127.0.0.1:{grpc_port}"

    def compose(self, *args: str, timeout_s: float = 900) -> str:
        command = [COMPOSE, "--ansi", "never", "-p", PROJECT, "-f", str(ROOT / "compose.yaml")]
        return run([*command, *args], self.environ, timeout_s)

    def docker(self, *args: str, timeout_s: float = 60) -> str:
        return run([DOCKER, *args], self.environ, timeout_s)

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def state(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/debug/state", timeout=5) as answer:
            return json.load(answer)

    def ready_workers(self) -> dict[str, int]:
        """How many workers of each role the gateway holds for Ready."""
        counts = {"prefill": 0, "decode": 0, "kvstore": 0}
        for worker in self.state()["workers"]:
            counts[worker["role"]] += worker["status"] == "ready"
        return counts

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def ask(self, question: str = QUESTION) -> str:
        answer = self.client().chat.completions.create(
            model="baton-tiny",
            messages=[{"role": "user", "content": question}],
            max_tokens=16,
            temperature=0,
        )
        return answer.choices[0].message.content


def wait_for(condition: Callable[[], bool], within_s: float) -> float:
    """Seconds until the condition held; fails when it did not in time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            pytest.fail(f"not within {within_s} s: {condition}")
        time.sleep(0.1)  # containers do not tell when it holds
    return time.monotonic() - began


@contextmanager
def _torn_down(mesh: Mesh) -> Iterator[None]:
    mesh.compose("down", "-v", "--remove-orphans", timeout_s=120)
    try:
        yield
    finally:
        mesh.compose("down", "-v", "--remove-orphans", timeout_s=180)


@pytest.fixture(scope="module")
def images() -> Iterator[Mesh]:
    """The four images, built by compose from the product's own files."""
    install()
    with running_engine() as environ:
        environ["BASE_IMAGE"] = base_image(DOCKER, environ)
        mesh = Mesh(environ, any_free(), any_free())
        mesh.compose("build")
        yield mesh
        # Layers stay in the builder's cache; names of old builds would pile up.
        mesh.docker("image", "prune", "-f")


@pytest.fixture(scope="module")
def mesh(images: Mesh) -> Iterator[Mesh]:
    with _torn_down(images):
        try:
            images.compose("up", "-d", "--no-build", timeout_s=300)
            wait_for(images.ready, READY_S)
            wait_for(lambda: min(images.ready_workers().values()) >= 1, READY_S)
        except BaseException:
            print(images.compose("ps"), images.compose("logs", "--tail=50"))
            raise
        yield images


@pytest.mark.parametrize("role", ["gateway", "kvstore"])
def test_images_without_a_model_core_hold_no_torch(images, role):
    with pytest.raises(RuntimeError, match="No module named 'torch'"):
        images.docker(
            "run", "--rm", "--entrypoint", "python", f"baton-{role}:test", "-c", "import torch"
        )


@pytest.mark.parametrize("role", ROLES)
def test_every_image_has_what_its_role_imports(images, role):
    shown = images.docker("run", "--rm", f"baton-{role}:test", "--help")
    assert f"baton serve {role}" in shown


def test_the_mesh_answers_the_openai_client(mesh):
    assert mesh.ask() == ANSWER
    chunks = mesh.client().chat.completions.create(
        model="baton-tiny",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER


def test_workers_of_one_machine_share_memory(mesh):
    mesh.ask(QUESTION * 8)
    links = [w["data_links"] for w in mesh.state()["workers"] if w["role"] == "prefill"]
    assert [set(to.values()) for to in links] == [{"shm"}]


def test_compiled_kernels_lie_in_a_volume_that_all_workers_share(mesh):
    count = "from pathlib import Path; print(len(list(Path('/var/cache/baton').rglob('*.nbc'))))"
    found = []
    for role in ("prefill", "decode"):
        (container,) = mesh.containers(role)
        mounts = {to["Destination"]: to["Type"] for to in _inspect(mesh, container)["Mounts"]}
        assert mounts["/var/cache/baton"] == "volume"
        found.append(int(mesh.docker("exec", container, "python", "-c", count)))
    assert found[0] == found[1] > 0


def test_public_grpc_is_published(mesh):
    from common.rpc.probe import probe

    assert probe(mesh.grpc_address) is None


def test_containers_are_healthy_read_only_and_without_root(mesh):
    containers = [c for role in ROLES for c in mesh.containers(role)]
    wait_for(
        lambda: all(
            _inspect(mesh, c)["State"]["Health"]["Status"] == "healthy" for c in containers
        ),
        READY_S,
    )
    for container in containers:
        shown = _inspect(mesh, container)
        assert shown["Config"]["User"] == USER
        assert shown["HostConfig"]["ReadonlyRootfs"] is True
        assert shown["HostConfig"]["CapDrop"] == ["ALL"]
        assert mesh.docker("exec", container, "id", "-u").strip() == "10001"


def _inspect(mesh: Mesh, container: str) -> dict:
    return json.loads(mesh.docker("inspect", container))[0]


def test_new_replicas_are_found_within_five_seconds_without_a_restart(mesh):
    gateway = mesh.containers("gateway")
    mesh.compose(
        *("up", "-d", "--no-build", "--no-recreate"),
        *("--scale", "prefill=2", "--scale", "decode=3"),
    )
    replicas = [*mesh.containers("prefill"), *mesh.containers("decode")]
    assert len(replicas) == 5
    # From the moment that the last replica itself is Ready.
    wait_for(lambda: all(_serving(mesh, c) for c in replicas), READY_S)
    wait_for(
        lambda: mesh.ready_workers() == {"prefill": 2, "decode": 3, "kvstore": 1}, FOUND_WITHIN_S
    )
    assert mesh.containers("gateway") == gateway
    assert [mesh.ask() for _ in range(6)] == [ANSWER] * 6


def _serving(mesh: Mesh, container: str) -> bool:
    role = _inspect(mesh, container)["Config"]["Labels"]["com.docker.compose.service"]
    address = {"prefill": "127.0.0.1:7100", "decode": "127.0.0.1:7200"}[role]
    try:
        mesh.docker("exec", container, "python", "-m", "common.rpc.probe", address)
    except RuntimeError:
        return False
    return True


def test_removed_replicas_are_forgotten_and_the_mesh_still_answers(mesh):
    mesh.compose(
        *("up", "-d", "--no-build", "--no-recreate"),
        *("--scale", "prefill=1", "--scale", "decode=1"),
    )
    wait_for(lambda: mesh.ready_workers() == {"prefill": 1, "decode": 1, "kvstore": 1}, 20.0)
    assert mesh.ask() == ANSWER


def test_every_service_ends_by_itself_on_sigterm(mesh):
    containers = {role: mesh.containers(role)[0] for role in ROLES}
    mesh.compose("stop", timeout_s=120)
    codes = {role: _inspect(mesh, c)["State"]["ExitCode"] for role, c in containers.items()}
    assert codes == dict.fromkeys(ROLES, 0)
