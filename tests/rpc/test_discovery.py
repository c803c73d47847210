import pytest

from common.errors import ConfigError
from common.rpc.discovery import own_address, parse_addresses, resolve


def test_addresses_are_host_and_port_pairs():
    assert parse_addresses(" a:1, [::1]:2 ,,b.c:65535") == [("a", 1), ("::1", 2), ("b.c", 65535)]
    assert parse_addresses("") == []


@pytest.mark.parametrize(
    "spec", ["host", "host:", ":7", "host:x", "host:0", "host:65536", "::1:7", "h:-1", "h:1.0"]
)
def test_what_is_not_host_and_port_is_refused_by_name(spec):
    with pytest.raises(ConfigError, match="address"):
        parse_addresses(f"good:1,{spec}")


async def test_names_become_every_address_behind_them_and_ips_stay():
    assert await resolve("localhost:7,10.1.2.3:8,[::1]:9") == {
        "127.0.0.1:7",
        "10.1.2.3:8",
        "[::1]:9",
    }


async def test_a_name_that_does_not_resolve_stands_for_none():
    assert await resolve("no-such-host.invalid:1,127.0.0.1:2") == {"127.0.0.1:2"}
    assert await resolve("") == set()


def test_peers_are_told_an_address_that_reaches_this_machine():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") == "127.0.0.1"
    assert own_address("10.0.0.7") == "10.0.0.7"
    assert own_address("0.0.0.0", "worker-3") == "worker-3"
    assert own_address("0.0.0.0") not in ("0.0.0.0", "", "::")
