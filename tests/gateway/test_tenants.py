"""API keys: who is let in, as which tenant, and what the file of keys may hold."""

import hashlib
import subprocess
import sys

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from common.errors import ConfigError, Unauthenticated
from services.gateway.tenants import MAX_TENANTS, Tenants, read_tenants
from tests.cli.conftest import baton
from tests.gateway.conftest import chat, completion
from tests.gateway.fake import END, FakeDecode, GatewayProcess, say
from tests.support.mesh import ROOT, wait_until

ACME, ACME_NEW, ZETA = "acme-0123456789abcdef", "acme-fedcba9876543210", "zeta-0123456789abcdef"
HASH = hashlib.sha256(ZETA.encode()).hexdigest()
FILE = f"# who may ask\n\nacme {ACME}\n  acme\t{ACME_NEW}  \nzeta sha256:{HASH}\n"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def keyed(model, tmp_path_factory):
    """A gateway that asks for keys, with one worker."""
    file = tmp_path_factory.mktemp("keys") / "api-keys"
    file.write_text(FILE)
    fake = FakeDecode(say([40, END]))
    gateway = GatewayProcess(model, fake.address, "--api-keys-file", str(file))
    yield gateway, fake
    assert gateway.stop() == 0
    fake.kill()


@pytest.fixture
def gateway(keyed) -> GatewayProcess:
    return keyed[0]


@pytest.fixture
def worker(keyed) -> FakeDecode:
    keyed[1].submits.clear()
    return keyed[1]


@pytest.fixture
def stub(gateway):
    with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.mark.parametrize(
    ("key", "tenant"), [(ACME, "acme"), (ACME_NEW, "acme"), (ZETA, "zeta")], ids=["1", "2", "hash"]
)
def test_the_keys_tenant_goes_to_the_worker_over_both_fronts(gateway, worker, stub, key, tenant):
    assert gateway.client.post(CHAT, json=chat(), headers=bearer(key)).status_code == 200
    lower = {"authorization": f"bearer  {key}"}
    assert gateway.client.post(COMPLETIONS, json=completion(), headers=lower).status_code == 200
    streamed = gateway.client.post(CHAT, json=chat(stream=True), headers=bearer(key))
    assert streamed.text.endswith("data: [DONE]\n\n")
    request = pb.CompletionRequest(model="m", text="hello")
    metadata = (("authorization", f"Bearer {key}"),)
    stub.Completion(request, metadata=metadata)
    list(stub.StreamCompletion(pb.StreamCompletionRequest(request=request), metadata=metadata))
    assert [submit.tenant for submit in worker.submits] == [tenant] * 5


REFUSED = {
    "no header": None,
    "empty header": "",
    "another scheme": f"Basic {ACME}",
    "no scheme": ACME,
    "a scheme alone": "Bearer",
    "an unknown key": "Bearer acme-0123456789abcdee",
    "a part of a key": f"Bearer {ACME[:-1]}",
    "another case": f"Bearer {ACME.upper()}",
    "two keys": f"Bearer {ACME} {ACME}",
    "the name": "Bearer acme",
    "a key's hash": f"Bearer sha256:{HASH}",
    "a long one": "Bearer " + "x" * 4000,
}


@pytest.mark.parametrize("header", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_without_a_key_that_is_known_http_answers_401(gateway, worker, path, header):
    headers = {} if header is None else {"Authorization": header}
    answer = gateway.client.post(path, json=chat(), headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "Authorization: Bearer KEY" in error["message"]
    assert not any(word in answer.text for word in ("acme", "zeta", HASH))
    assert worker.submits == []


def test_bytes_that_are_no_text_are_an_unknown_key(gateway):
    headers = {b"Authorization": b"Bearer \xff\xfe\x80" + ACME.encode()}
    assert gateway.client.post(CHAT, json=chat(), headers=headers).status_code == 401


def test_the_key_is_asked_for_before_the_body_is_looked_at(gateway):
    assert gateway.client.post(CHAT, content=b"{" * 10_000).status_code == 401
    assert gateway.client.post(CHAT, content=b"{", headers=bearer(ACME)).status_code == 400


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", f"Basic {ACME}", "Bearer unknown"])
def test_without_a_key_that_is_known_grpc_answers_unauthenticated(stub, worker, header):
    metadata = () if header is None else (("authorization", header),)
    request = pb.CompletionRequest(model="m", text="hello")
    asked = [
        lambda: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        lambda: stub.Completion(request, metadata=metadata),
        lambda: stub.ChatCompletion(pb.ChatCompletionRequest(model="m"), metadata=metadata),
        lambda: list(
            stub.StreamCompletion(pb.StreamCompletionRequest(request=request), metadata=metadata)
        ),
    ]
    for ask in asked:
        with pytest.raises(grpc.RpcError) as refused:
            ask()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "Bearer KEY" in refused.value.details()
    assert worker.submits == []


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/debug/state"])
def test_what_operators_ask_needs_no_key(gateway, path):
    assert gateway.client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/debug/traces/" + "0" * 32, "/x"])
def test_everything_else_does(gateway, path):
    assert gateway.client.get(path).status_code == 401
    assert gateway.client.get(path, headers=bearer(ACME)).status_code in (200, 404)


def test_grpc_health_needs_no_key(gateway):
    with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        asked = health_pb2.HealthCheckRequest(service="baton.v1.InferenceService")
        serving = health_pb2.HealthCheckResponse.SERVING
        health = health_pb2_grpc.HealthStub(channel)
        wait_until(lambda: health.Check(asked).status == serving, 5, "health")


def test_openais_client_gets_its_own_errors_and_answers(gateway, worker):
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="nobody", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(**chat())
    assert refused.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=ZETA, max_retries=0)
    (model,) = client.models.list().data
    assert client.chat.completions.create(**chat(model=model.id)).choices[0].message.content
    assert [submit.tenant for submit in worker.submits] == ["zeta"]


def test_a_prompt_is_expected_to_be_cached_for_who_sent_it_only(gateway, worker):
    body = completion(prompt=[7] * 100)

    def expected(key: str) -> str:
        answer = gateway.client.post(COMPLETIONS, json=body, headers=bearer(key))
        url = f"/debug/traces/{answer.headers['x-trace-id']}"
        spans = gateway.client.get(url, headers=bearer(key)).json()["spans"]
        (route,) = [span for span in spans if span["name"] == "gateway.route"]
        return route["attributes"]["expected_cached_tokens"]

    assert [expected(key) for key in (ACME, ACME_NEW, ZETA, ZETA)] == ["0", "96", "0", "96"]


def test_a_trace_is_shown_to_whose_requests_are_in_it_and_only_those(gateway, worker):
    parent = {"traceparent": f"00-{'5' * 32}-{'6' * 16}-01"}  # the same of both

    def spans(key: str) -> tuple[int, list[dict]]:
        answer = gateway.client.get(f"/debug/traces/{'5' * 32}", headers=bearer(key))
        return answer.status_code, answer.json().get("spans", [])

    gateway.client.post(CHAT, json=chat(), headers=bearer(ZETA) | parent).raise_for_status()
    assert spans(ACME)[0] == 404
    gateway.client.post(CHAT, json=chat(), headers=bearer(ACME) | parent).raise_for_status()
    (status, own), (_, others) = spans(ACME), spans(ZETA)
    assert status == 200
    for seen, tenant in ((own, "acme"), (others, "zeta")):
        assert {"gateway.request", "gateway.route"} <= {span["name"] for span in seen}
        assert {span["attributes"].get("tenant", tenant) for span in seen} == {tenant}
    assert not {span["span_id"] for span in own} & {span["span_id"] for span in others}


def test_usage_is_told_by_tenant_for_those_of_the_file_only(gateway, worker):
    def told() -> dict[str, float]:
        lines = gateway.client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("baton:tenant_"))
        return {name: float(value) for name, value in pairs if "_created" not in name}

    before = told()
    gateway.client.post(CHAT, json=chat(), headers=bearer(ZETA)).raise_for_status()
    gateway.client.post(CHAT, json=chat(), headers=bearer("x" * 20))
    after = told()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    prompt = len(worker.submits[0].token_ids)
    assert grown == {
        'baton:tenant_requests_total{tenant="zeta"}': 1,
        'baton:tenant_prompt_tokens_total{tenant="zeta"}': prompt,
        'baton:tenant_generation_tokens_total{tenant="zeta"}': 2,
        'baton:tenant_prompt_tokens_cached_total{tenant="zeta"}': 3,
    }
    assert len(after) == 2 * len(grown)


def test_no_key_is_ever_logged(gateway):
    for key in (ACME, ZETA, "x" * 20):
        gateway.client.post(CHAT, json=chat(), headers=bearer(key))
    assert wait_until(lambda: gateway.events("request_refused"), 5, "a line of the refusal")
    log = "".join(gateway.log)
    assert not any(secret in log for secret in (ACME, ACME_NEW, ZETA, HASH, "x" * 20))


def test_the_commands_bring_their_key(gateway):
    chatting = ("chat", f"--url={gateway.url}", "--model=m", "hello")
    quiet = {"PATH": "/usr/bin:/bin"}
    refused = baton(*chatting, env=quiet)
    assert refused.returncode == 1
    assert "401" in refused.stderr
    assert "BATON_API_KEY" in refused.stderr
    assert baton(*chatting, f"--api-key={ZETA}", env=quiet).returncode == 0
    assert baton(*chatting, env=quiet | {"OPENAI_API_KEY": ZETA}).returncode == 0
    both = quiet | {"OPENAI_API_KEY": "another", "BATON_API_KEY": ZETA}
    assert baton("generate", f"--url={gateway.url}", "hello", env=both).returncode == 0
    bench = ("bench", "serve", f"--url={gateway.url}", "--requests=2", "--rounds=1")
    assert "401" in baton(*bench, env=quiet).stderr
    measured = baton(*bench, "--input-words=4", "--output-tokens=2", env=both)
    assert measured.returncode == 0, measured.stderr
    evaluate = ("eval", f"--url={gateway.url}", "--questions=1", "--contexts=64")
    assert "401" in baton(*evaluate, env=quiet).stderr
    spaced = baton(*chatting, "--api-key=a b", env=quiet)
    assert "--api-key" in spaced.stderr


def test_without_a_file_nothing_is_asked_for_and_a_key_changes_nothing(model):
    fake = FakeDecode(say([40, END]))
    gateway = GatewayProcess(model, fake.address)
    try:
        for headers in ({}, bearer("unused"), {"Authorization": "Basic abc"}):
            answer = httpx.post(gateway.url + CHAT, json=chat(), headers=headers)
            assert answer.status_code == 200
        assert [submit.tenant for submit in fake.submits] == [""] * 3
        assert "baton:tenant_requests_total{" not in gateway.client.get("/metrics").text
    finally:
        gateway.stop()
        fake.kill()


BAD_FILES = {
    "no key at all": ("# nothing\n\n", "holds no key"),
    "a name alone": (f"acme {ACME}\nzeta\n", "line 2: 0 words follow the tenant 'zeta'"),
    "an empty hash": ("acme sha256:\n", "line 1: what follows sha256:"),
    "a short hash": ("acme sha256:abcd\n", "line 1: what follows sha256:"),
    "a short key": ("acme secret\n", "line 1: the key of 'acme' is not 16"),
    "a long key": ("acme " + "x" * 513, "line 1: the key of 'acme' is not 16"),
    "a key of other letters": ("acme clé-0123456789abcdef\n", "line 1: the key of 'acme'"),
    "more words": (f"acme {ACME} {ACME_NEW}\n", "line 1: 2 words follow"),
    "a name with a colon": (f"acme: {ACME}\n", "line 1: the tenant's name"),
    "a long name": (f"{'a' * 65} {ACME}\n", "line 1: the tenant's name"),
    "a key twice": (f"acme {ACME}\n#\nzeta {ACME}\n", "line 3: this is the key of line 1"),
    "a key and its hash": (f"acme sha256:{HASH}\nzeta {ZETA}", "line 2: this is the key of line 1"),
    "JSON": ('{"acme": "' + ACME + '"}', "line 1: the tenant's name"),
    "no text": (b"acme \xff\xfe0123456789abcdef\n", "not UTF-8"),
    "too many tenants": (
        "".join(f"t{i} {ACME}-{i}\n" for i in range(MAX_TENANTS + 1)),
        f"at most {MAX_TENANTS}",
    ),
    "too large": ("#" * 2**20 + "\n", "over 1048576 bytes"),
}


@pytest.mark.parametrize(("content", "why"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_meant_is_refused_by_line_and_tells_no_key(tmp_path, content, why):
    file = tmp_path / "api-keys"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="api-keys") as refused:
        read_tenants(file)
    assert why in str(refused.value)
    assert "0123456789abcdef" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_tenants(path)


def test_a_gateway_with_a_bad_file_does_not_start(tmp_path, model):
    file = tmp_path / "api-keys"
    file.write_text("acme short\n")
    command = [sys.executable, "-m", "services.gateway.main", f"--model={model}"]
    ended = subprocess.run(
        [*command, f"--api-keys-file={file}", "--http-port=0", "--port=0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert f"error: {file}, line 1: the key of 'acme'" in ended.stderr


def test_a_file_made_elsewhere_reads_the_same(tmp_path):
    file = tmp_path / "api-keys"
    file.write_bytes(b"\xef\xbb\xbf" + FILE.replace("\n", "\r\n").encode())
    tenants = read_tenants(file)
    assert tenants.names == ("acme", "zeta")
    assert tenants.tenant_of(f"Bearer {ZETA}") == "zeta"


def test_no_keys_is_not_the_same_as_no_file():
    assert Tenants().tenant_of(None) == ""
    with pytest.raises(Unauthenticated):
        Tenants({}).tenant_of("Bearer anything-0123456789")
