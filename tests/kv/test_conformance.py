"""Every connector keeps the contract: Baton's own, a chain of them, and the one that the
documentation shows to authors."""

import itertools
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from baton.conformance import CHECKS, Subject, checks
from common.errors import ConfigError
from common.kv.connector import KVConnector
from common.kv.connectors.chain import ChainConnector
from common.kv.connectors.handoff import HandoffReceiver, HandoffSender
from common.kv.connectors.registry import ConnectorContext, make_connector, parse_connectors
from common.kv.connectors.store import StoreConnector, StoreSettings
from common.kv.handoff import HandoffPolicy, PrefillCandidates
from common.kv.keys import chain_keys
from common.rpc.loop import LoopThread
from tests.kv.store_process import ROOT, StoreProcess
from tests.kv.support import CARD, FINGERPRINT, PrefillWorker, until

pytestmark = pytest.mark.timeout(120)
EXAMPLE = ROOT / "examples" / "folder_connector"
PATIENT = StoreSettings(lookup_timeout_s=5.0)


def receiver(number: int) -> HandoffReceiver:
    connector = HandoffReceiver(
        incarnation=f"decode-{number}",
        model_card=lambda: CARD,
        advertise_host="127.0.0.1",
        data_host="127.0.0.1",
        policy=HandoffPolicy(min_tokens=8, stall_timeout_s=2.0),
    )
    connector.listen()
    return connector


@contextmanager
def of_nothing(folder: Path) -> Iterator[Subject]:
    yield Subject(KVConnector, loads=False)


@contextmanager
def of_a_sender(folder: Path) -> Iterator[Subject]:
    yield Subject(HandoffSender, loads=False)


@contextmanager
def of_a_store(folder: Path) -> Iterator[Subject]:
    with StoreProcess() as store:
        yield Subject(
            lambda: StoreConnector([store.address], settings=PATIENT), spoil=store.process.kill
        )


@contextmanager
def of_a_handoff(folder: Path) -> Iterator[Subject]:
    prefill, numbers = PrefillWorker(num_blocks=256), itertools.count()
    candidates = PrefillCandidates((prefill.address,))
    yield Subject(lambda: receiver(next(numbers)), transfer=candidates, spoil=prefill.stop)
    prefill.stop()


@contextmanager
def of_a_chain(folder: Path) -> Iterator[Subject]:
    prefill, numbers = PrefillWorker(num_blocks=256, ahead=True), itertools.count()
    with StoreProcess() as store:

        def make() -> KVConnector:
            first = StoreConnector([store.address], settings=PATIENT)
            return ChainConnector([first, receiver(next(numbers))])

        def spoil() -> None:
            store.process.kill()
            prefill.stop()

        yield Subject(make, transfer=PrefillCandidates((prefill.address,)), spoil=spoil)
    prefill.stop()


@contextmanager
def of_the_example(folder: Path) -> Iterator[Subject]:
    sys.path.insert(0, str(EXAMPLE))
    from folder_connector import FolderConnector

    def spoil() -> None:
        # A block is written beside its place, with a suffix, and then moved there.
        until(lambda: not list(folder.glob("kv/*.*")))
        for path in list(folder.glob("kv/*")):
            if not path.suffix:
                path.write_bytes(path.read_bytes()[:-1])

    yield Subject(lambda: FolderConnector(folder / "kv"), spoil=spoil)
    sys.path.remove(str(EXAMPLE))


SUBJECTS = [of_nothing, of_a_sender, of_a_store, of_a_handoff, of_a_chain, of_the_example]


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda make: make.__name__)
def subject(request, tmp_path_factory):
    with request.param(tmp_path_factory.mktemp("connector")) as subject:
        yield subject


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_connector_conforms(subject, check):
    check(subject)


KEPT: list[KVConnector] = []


class Defect:
    """The example connector with one thing wrong."""

    @staticmethod
    def late_kv_lands_in_pages_of_others(connector):
        connector.request_finished = lambda sequence, block_ids: False

    @staticmethod
    def nobody_is_woken(connector):
        connector._tell = connector._inbox.append

    @staticmethod
    def tenants_share_keys(connector):
        connector._keys = lambda sequence, blocks: chain_keys(
            sequence.token_ids[: blocks * 16], 16, FINGERPRINT
        )

    @staticmethod
    def failed_loads_are_not_told(connector):
        connector.get_block_ids_with_load_errors = set

    @staticmethod
    def a_request_is_never_done_sending(connector):
        connector.request_finished = lambda sequence, block_ids: True

    @staticmethod
    def its_pool_outlives_it(connector):
        KEPT.append(connector)  # a pool that is forgotten ends its threads by itself
        connector.shutdown = lambda: connector._pool.submit(print).result()

    @staticmethod
    def blocks_are_named_before_their_tokens_are_known(connector):
        connector.save_kv_layer = lambda layer: layer == 2 and connector.wait_for_save()

    @staticmethod
    def nothing_is_saved(connector):
        connector.wait_for_save = lambda: None


FINDS = {
    "late_kv_lands_in_pages_of_others": "an_abort_lets_go_of_the_blocks_and_nothing_late",
    "nobody_is_woken": "it_wakes_the_engine",
    "tenants_share_keys": "kv_of_another_tenant",
    "failed_loads_are_not_told": "a_load_that_fails_is_computed",
    "a_request_is_never_done_sending": "what_one_worker_computed",
    "its_pool_outlives_it": "shutdown_leaves_no_thread",
    "blocks_are_named_before_their_tokens_are_known": "steps_begun_before_the_tokens",
    "nothing_is_saved": "what_one_worker_computed",
}


@pytest.mark.parametrize("defect", FINDS)
def test_the_checks_find_a_connector_that_breaks_the_contract(defect, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "PATIENCE_S", 0.5)
    with of_the_example(tmp_path) as good:

        def make():
            connector = good.make()
            getattr(Defect, defect)(connector)
            return connector

        (check,) = (c for c in CHECKS if c.__name__.startswith(FINDS[defect]))
        with pytest.raises((AssertionError, struct.error)):  # a key of no token
            check(Subject(make, spoil=good.spoil))


def install_example(folder: Path) -> Path:
    """What `pip install examples/folder_connector` would put into site-packages."""
    shutil.copy(EXAMPLE / "folder_connector.py", folder)
    info = folder / "baton_folder_connector-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: baton-folder-connector\nVersion: 0.1.0\n")
    entry = "[baton.kv_connectors]\nfolder = folder_connector:make\n"
    assert entry.splitlines()[1].split(" = ")[1] in (EXAMPLE / "pyproject.toml").read_text()
    (info / "entry_points.txt").write_text(entry + "broken = nowhere:make\nwrong = os:getcwd\n")
    return folder


def test_an_installed_connector_can_be_checked_from_a_shell(tmp_path):
    path = f"{install_example(tmp_path)}:{ROOT}"
    command = [sys.executable, "-m", "baton.conformance", f"folder:{tmp_path / 'kv'}"]
    done = subprocess.run(
        command, env={"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("ok    ") == len(CHECKS) - 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nobody", "no KV connector is named 'nobody'; there are broken, folder, handoff, store"),
        ("broken", "the KV connector 'broken' of nowhere:make cannot be made"),
        ("wrong", "the KV connector 'wrong' of os:getcwd cannot be made"),
        ("folder", "folder needs a path"),
    ],
)
def test_a_connector_that_cannot_be_made_is_an_error_that_names_it(
    name, text, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(install_example(tmp_path)))
    loop = LoopThread("test")
    with pytest.raises(ConfigError) as caught:
        make_connector(name, ConnectorContext("decode", "", loop))
    assert text in str(caught.value)
    loop.close()


def test_the_setting_names_connectors_in_order_with_their_arguments():
    assert parse_connectors(" store, folder:/a:b ,handoff") == [
        ("store", ""),
        ("folder", "/a:b"),
        ("handoff", ""),
    ]
    for text in ("", "store,store", ":x", " , "):
        with pytest.raises(ConfigError, match="does not name connectors"):
            parse_connectors(text)
