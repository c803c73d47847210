from common.kv.connector import KVConnector
from common.worker.timeline import ForwardingConnector


def test_every_call_of_the_connector_api_reaches_the_connector_inside():
    api = {name for name in vars(KVConnector) if not name.startswith("_")}
    assert api
    assert api <= set(vars(ForwardingConnector))
