"""Proof that a KV connector keeps the contract of common/kv/connector.py; see docs/connectors.md.

From a test suite, each check a test of its own:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_the_connector_conforms(check, tmp_path):
        check(Subject(lambda: MyConnector(tmp_path)))

From a shell, for a connector with an entry point: `python -m baton.conformance my:argument`.
"""

from baton.conformance.checks import CHECKS, Subject
from baton.conformance.driven import DrivenWorker

__all__ = ["CHECKS", "DrivenWorker", "Subject"]
