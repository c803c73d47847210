"""`baton bench`: figures are consistent with each other, and written in vllm bench's JSON keys."""

import json
import statistics

import pytest
from safetensors import safe_open

from baton.cli.bench import main
from baton.cli.bench_offline import latency_figures, weight_bytes
from common.engine.config import EngineConfig, ModelConfig
from tests.cli.conftest import MODEL
from tests.engine.zoo import checkpoint


def test_throughput_counts_all_tokens_and_writes_json(tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--input-len=9", "--output-len=5", "--num-prompts=7", f"--output-json={file}"]
    assert main(["throughput", f"--model={MODEL}", *flags]) == 0
    assert "Throughput:" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (7, 7 * 14)
    assert found["tokens_per_second"] * found["elapsed_time"] == pytest.approx(7 * 14)


def test_flags_of_vllm_bench_are_taken_and_every_answer_counts(tmp_path):
    file = tmp_path / "figures.json"
    flags = ["--input-len=9", "--output-len=5", "--num-prompts=3", "--n=2", "--block-size=8"]
    flags += ["--max-model-len=32", "--no-enable-prefix-caching", "-tp=1", "--output-json"]
    assert main(["throughput", f"--model={MODEL}", *flags, str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["total_num_tokens"] == 3 * (9 + 2 * 5)


def test_latency_times_every_batch_and_writes_json(tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--batch-size=2", "--output-len=6", "--num-iters=3", "--num-iters-warmup=1"]
    assert main(["latency", f"--model={MODEL}", *flags, f"--output-json={file}"]) == 0
    assert "GB/s of weights" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(statistics.fmean(found["latencies"]))
    assert found["percentiles"]["99"] == max(found["latencies"])


def test_decoding_is_what_is_left_after_the_first_token():
    found = latency_figures([1.2, 9.0, 1.2], [0.2, 0.2, 5.0], 4, 11, weights=1000)
    assert found["output_tokens_per_second"] == pytest.approx(4 * 10 / 1.0)
    assert found["weight_bytes_per_second"] == pytest.approx(1000 * 10 / 1.0)
    assert "weight_bytes_per_second" not in latency_figures([1.0], [1.0], 1, 1, weights=1000)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_bytes_are_those_of_the_matrices_that_a_step_reads(tied, dtype):
    path = checkpoint("qwen3", tied)
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    read = [
        shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and (tied or "embed" not in name)
    ]
    config = EngineConfig(path, dtype=dtype)
    wanted = sum(read) * {"float32": 4, "bfloat16": 2}[dtype]
    assert weight_bytes(config, ModelConfig.from_folder(path)) == wanted


@pytest.mark.parametrize(
    ("argv", "named"), [(["latency", "--batch-size=0"], "--batch-size"), (["fly"], "fly")]
)
def test_what_cannot_work_is_refused(argv, named, capsys):
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2
    assert named in capsys.readouterr().err
