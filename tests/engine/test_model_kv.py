"""What the KV cache holds: its bytes, its quantization, and who may see them."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from common.engine.cache import KVCache
from common.engine.kernels.reference import ReferenceOps, dequantize_fp8, quantize_fp8
from common.kv.connector import KVConnector
from common.kv.layout import KVLayout
from tests.engine import emulation, zoo
from tests.engine.driving import make_batch, make_runner, prompt_logits, shuffled_blocks

torch.set_num_threads(1)

PROMPT = zoo.random_prompt(60, seed=11)
LLAMA = {**zoo.SHAPE, "rope_theta": 10000.0, "eps": 1e-6}
KEEP = {"float32": lambda x: x, "bf16": emulation.round_bf16, "fp8_e4m3": emulation.round_fp8}


@pytest.mark.parametrize("kv_dtype", KEEP)
@pytest.mark.parametrize("chunks", [[60], [17, 1, 42]])
def test_logits_over_a_quantized_cache_are_those_of_a_float64_emulation(kv_dtype, chunks):
    path = zoo.checkpoint("llama", False)
    runner = make_runner(path, kv_dtype=kv_dtype)
    got = prompt_logits(runner, PROMPT, shuffled_blocks(runner), chunks).double().numpy()
    want = emulation.llama_logits(path, LLAMA, PROMPT, KEEP[kv_dtype])
    error = np.abs(got - want).max()
    if kv_dtype == "float32":
        assert error < 1e-4
        return
    # A value on the edge between two quantized ones may fall either way in float32; that moves a
    # logit far less than quantizing does.
    effect = np.abs(want - emulation.llama_logits(path, LLAMA, PROMPT, KEEP["float32"])).max()
    assert effect > 1e-3
    assert error < effect / 8
    assert np.median(np.abs(got - want)) < effect / 200


def _vectors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    plain = torch.randn(40, 16, generator=generator)
    sizes = torch.tensor([0.0, 1e-42, 1e-38, 1e-20, 1e-3, 1.0, 3e5, 3e38])[:, None]
    scaled = torch.randn(8, 16, generator=generator).clamp(-1, 1) * sizes
    edges = torch.tensor([[448.0, 440, 432, 433, 431, 17, 18, 19, 20, 0.0146, 0.001, 0.00097,
                           0.0029, -0.0029, -17, -0.0]])  # fmt: skip
    return torch.cat((plain, scaled, edges))


def test_fp8_values_are_the_nearest_by_whole_number_arithmetic():
    x = _vectors()
    values, scale = quantize_fp8(x)
    for row, got, s in zip(
        x.tolist(), values.view(torch.uint8).tolist(), scale.tolist(), strict=True
    ):
        assert s == pytest.approx(max(map(abs, row)) / 448, rel=1e-6, abs=1e-44)
        for value, byte in zip(row, got, strict=True):
            # The quotient is rounded to float32 before it is rounded to e4m3.
            quotient = np.float32(value) / np.float32(s) if s else 0.0
            want = emulation.e4m3_byte(Fraction(float(quotient)))
            assert byte & 0x7F == want & 0x7F
            assert byte & 0x7F != 0x7F
            assert byte & 0x7F == 0 or byte >> 7 == want >> 7


def test_every_fp8_byte_reads_back_as_its_value_times_the_scale():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    got = dequantize_fp8(every, torch.full((256,), 0.75), torch.float32)[:, 0].tolist()
    for byte, value in enumerate(got):
        want = emulation.e4m3_value(byte)
        assert math.isnan(value) if want is None else value == float(want) * 0.75


def test_infinities_saturate_and_zero_vectors_have_scale_zero():
    x = torch.tensor([[math.inf, -math.inf, 1.0, 0.0], [0.0, -0.0, 0.0, 0.0]])
    values, scale = quantize_fp8(x)
    assert values.float()[0, :2].tolist() == [448.0, -448.0]
    back = dequantize_fp8(values, scale, torch.float32)
    assert torch.isfinite(back).all()
    assert scale[1] == 0
    assert not back[1].any()


@pytest.mark.parametrize(("kv_dtype", "code"), [("float32", "f"), ("bf16", "H"), ("fp8_e4m3", "B")])
def test_kv_lies_in_the_block_where_the_layout_says(kv_dtype, code):
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=8, kv_dtype=kv_dtype)
    cache = KVCache(layout, num_blocks=5, device=torch.device("cpu"))
    batch = make_batch([([0], 21, [9, 9, 3])], size=8)  # position 21: block 3, token 5
    k, v = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    unturned = torch.ones(32, 4), torch.zeros(32, 4)
    step = ReferenceOps().prepare(batch, cache, 2, (None,) * 3, unturned)
    qkv = torch.cat((torch.randn(1, 2, 4), k, v), 1)
    ReferenceOps().write_kv(qkv, cache, 1, step)
    raw, width = cache.data[3].numpy().tobytes(), struct.calcsize(code)
    assert len(raw) == layout.block_bytes
    for side, tensor in enumerate((k, v)):
        for head in range(2):
            vector = ((1 * 2 + side) * 2 + head) * 8 + 5
            got = struct.unpack_from(f"<4{code}", raw, vector * 4 * width)
            want = tensor[0, head].tolist()
            scale = max(map(abs, want)) / 448
            if kv_dtype == "float32":
                assert list(got) == want
            elif kv_dtype == "bf16":
                bits = [struct.unpack("<f", struct.pack("<I", g << 16))[0] for g in got]
                assert bits == emulation.round_bf16(np.array(want)).tolist()
            else:
                stored = struct.unpack_from("<f", raw, layout.payload_bytes + vector * 4)[0]
                assert stored == pytest.approx(scale, rel=1e-6)
                near = [float(emulation.e4m3_value(b)) * scale for b in got]
                assert near == pytest.approx(want, rel=1 / 16, abs=scale / 500)
    written = 2 * 2 * (4 * width + (4 if kv_dtype == "fp8_e4m3" else 0))
    assert int((cache.data != 0).sum()) <= written
    assert not cache.data[[0, 1, 2, 4]].any()


@pytest.mark.parametrize("kv_dtype", KEEP)
@pytest.mark.parametrize("arch", ["llama", "mistral_window"])
def test_bytes_in_unused_slots_never_influence_a_result(arch, kv_dtype):
    path = zoo.checkpoint(arch, False)
    results = []
    for garbage in (0, 0x7F, 0xFF, 0x42):
        runner = make_runner(path, kv_dtype=kv_dtype)
        runner.cache.fill_(garbage)
        rows = [(PROMPT[:50], 0, [7, 3, 9, 2]), (PROMPT[:3], 0, [5]), (PROMPT[:33], 0, [8, 4, 6])]
        out = [runner.forward(make_batch(rows, 16))]
        after = [(PROMPT[len(t) : len(t) + 1], len(t), table) for t, _, table in rows]
        out.append(runner.forward(make_batch(after, 16)))
        results.append(torch.cat(out))
    assert torch.isfinite(results[0]).all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_a_connector_sees_each_layer_loaded_before_and_saved_after_its_kv_is_written():
    runner = make_runner(zoo.checkpoint("llama", False))
    runner.cache.zero_()
    calls = []

    class Spy(KVConnector):
        def wait_for_layer_load(self, layer):
            calls.append(("load", layer, bool(runner._cache.payload[layer][3].any())))

        def save_kv_layer(self, layer):
            calls.append(("save", layer, bool(runner._cache.payload[layer][3].any())))

    runner.forward(make_batch([(PROMPT[:9], 0, [3])], 16), Spy())
    assert calls == [(kind, i, kind == "save") for i in range(3) for kind in ("load", "save")]


def test_kv_copied_into_the_cache_of_another_runner_serves_there():
    path = zoo.checkpoint("qwen3", True)
    here, there = make_runner(path), make_runner(path)
    assert here.fingerprint == there.fingerprint
    here.forward(make_batch([(PROMPT[:59], 0, [2, 4, 6, 8])], 16))
    there.cache[[9, 7, 5, 3]] = here.cache[[2, 4, 6, 8]]
    got = there.forward(make_batch([(PROMPT[59:], 59, [9, 7, 5, 3])], 16))
    want = zoo.expected_logits(path, PROMPT)[-1:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
