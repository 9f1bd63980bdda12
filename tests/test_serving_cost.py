"""The cost model of serving latent attention: numbers worked out by hand, what must hold anyway, its page."""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest

from models.serving_cost import CHIPS, SHAPES, Chip, Scheme, Shape, break_even, decode_cost, max_batch, throughput

ROOT = Path(__file__).parent.parent
MLA, TPLA, GLA = Scheme("mla_tp"), Scheme("tpla", slices=2), Scheme("gla", slices=2)
SCATTER = Scheme("tpla", slices=2, output="scatter_heads")
SEQUENCE, DATA = Scheme("sequence"), Scheme("data_parallel")
V3, KIMI, H100, H800 = SHAPES["deepseek-v3"], SHAPES["kimi-k2"], CHIPS["h100"], CHIPS["h800"]

TINY = Shape("tiny", 10, 1, 4, q_lora_rank=6, kv_lora_rank=8, qk_rope_head_dim=2, qk_nope_head_dim=3, v_head_dim=5)
FULL = {"matmul_efficiency": 1.0, "bandwidth_efficiency": 1.0, "link_efficiency": 1.0, "memory_fraction": 1.0}
TOY = Chip("toy", flops=100, bandwidth=10, memory=1e4, link_bandwidth=5, collective_seconds=2, **FULL)


def tiny(scheme, chip=TOY, devices=4, batch=3, context=7, **options):
    return decode_cost(TINY, chip, scheme, devices=devices, batch=batch, context=context, **options)


# Four devices, three requests of seven cached tokens. By hand, elements of weights, as W_DQ + W_UQ + W_DKV and W_KR +
# W_UK and W_UV + W_O; cached rows x width; FLOPs 2 x heads x rows x (two latents and a rotary key); bytes sent.
BY_HAND = {
    MLA: (60 + 30 + 100 + 64 + 50, 21 * 10, 2 * 1 * 21 * 18, 1, 90),
    TPLA: (60 + 60 + 60 + 64 + 100, 21 * 6, 2 * 2 * 21 * 10, 1, 90),
    SCATTER: (60 + 60 + 60 + 64 + 50, 21 * 6, 2 * 2 * 21 * 10, 2, 90 + 30),
    GLA: (60 + 30 + 60 + 32 + 50, 21 * 6, 2 * 1 * 21 * 10, 1, 90),
    SEQUENCE: (60 + 30 + 100 + 64 + 50, 3 * 2 * 10, 2 * 4 * 6 * 18, 4, 90 + 180 + 144 + 144),  # ceil(7 / 4) = 2 rows.
    DATA: (60 + 120 + 100 + 256 + 200, 7 * 10, 2 * 4 * 7 * 18, 0, 0),  # ceil(3 / 4) = 1 request.
}


@pytest.mark.parametrize("scheme", BY_HAND, ids=lambda scheme: scheme.name)
def test_counts_are_those_worked_out_by_hand(scheme):
    weights, cached, flops, collectives, sent = BY_HAND[scheme]
    cost = tiny(scheme)
    assert cost.weight_bytes == 2 * weights and cost.cache_bytes == 2 * cached
    assert cost.attention_flops == cost.padded_attention_flops == flops
    assert cost.projection_flops == 2 * weights * (1 if scheme is DATA else 3)
    assert (cost.collectives, cost.collective_bytes) == (collectives, sent)


def test_the_device_with_most_requests_counts():
    assert tiny(DATA, batch=5).cache_bytes == 2 * tiny(DATA, batch=4).cache_bytes == 2 * 2 * 7 * 10


def test_times_are_those_worked_out_by_hand():
    cost = tiny(TPLA)
    # Attention reads 252 bytes of cache, and queries and outputs of 3 requests, 2 heads: 2 * 4 + 2 elements of 2 bytes.
    assert cost.attention_seconds == pytest.approx((252 + 120) / 10)
    # Projections read 688 bytes, and per request 60 elements before and 38 after attention.
    assert cost.projection_seconds == pytest.approx((688 + 3 * 98 * 2) / 10)
    assert cost.activation_bytes == 120 + 588
    assert cost.collective_seconds == pytest.approx(2 + 90 / 5)
    assert cost.seconds == pytest.approx(37.2 + 127.6 + 20)
    tiled = tiny(TPLA, dataclasses.replace(TOY, row_tile=64))
    assert tiled.padded_attention_flops == 2 * 64 * 21 * 10 and tiled.attention_flops == cost.attention_flops
    assert tiled.attention_seconds == pytest.approx(268.8)  # Computing rows that are not there is now what takes long.
    lanes = tiny(TPLA, dataclasses.replace(TOY, lane=8))  # Latent and rotary key of 4 and 2 become 8 and 8.
    assert lanes.cache_bytes == 2 * 21 * 16 and lanes.padded_attention_flops == 2 * 2 * 21 * (16 + 8)
    assert tiny(TPLA, dataclasses.replace(TOY, flops=1)).projection_seconds == pytest.approx(2 * 3 * 344)
    half = dataclasses.replace(TOY, bandwidth_efficiency=0.5, matmul_efficiency=0.25, link_efficiency=0.1)
    assert tiny(TPLA, half).seconds == pytest.approx(2 * (37.2 + 127.6) + 2 + 180)
    assert tiny(TPLA, weight_itemsize=1, cache_itemsize=4).weight_bytes == 344
    assert tiny(TPLA, weight_itemsize=1, cache_itemsize=4).cache_bytes == 504


def test_plain_queries_have_one_projection():
    plain = dataclasses.replace(TINY, q_lora_rank=0)
    cost = decode_cost(plain, TOY, MLA, devices=4, batch=1, context=1)
    assert cost.weight_bytes == 2 * (10 * 5 + 100 + 64 + 50)


def test_bytes_that_the_paper_states():
    """V3 in bfloat16: 576 and 320 elements a token, 70,272 and 39,040 bytes over 61 layers; on TPU 640 and 384."""
    mla, tpla = (decode_cost(V3, H100, scheme, devices=2, batch=1, context=1) for scheme in (MLA, TPLA))
    assert (mla.row_bytes, tpla.row_bytes) == (2 * 576, 2 * 320)
    assert (61 * mla.cache_bytes, 61 * tpla.cache_bytes) == (70_272, 39_040)
    mla, tpla = (decode_cost(V3, CHIPS["v5p"], scheme, devices=2, batch=1, context=1) for scheme in (MLA, TPLA))
    assert (mla.row_bytes, tpla.row_bytes) == (2 * 640, 2 * 384)


def test_flops_are_equal_except_that_the_rotary_term_doubles():
    mla, tpla = (decode_cost(V3, H100, scheme, devices=2, batch=3, context=1000) for scheme in (MLA, TPLA))
    rotary = 2 * 3 * 1000 * 64 * 64  # Requests, tokens, half of the heads, width.
    assert mla.attention_flops - rotary == tpla.attention_flops - 2 * rotary == 2 * 3 * 1000 * 64 * 1024


def test_weights_that_are_held_twice():
    """75 and 235 MB of W_UQ and W_O instead of half of each; the down-projection of half the latent is spared."""
    mla, tpla = (decode_cost(V3, H100, scheme, devices=2, batch=1, context=1) for scheme in (MLA, TPLA))
    queries, output, down = 1536 * 128 * 192 * 2, 128 * 128 * 7168 * 2, 7168 * 256 * 2
    assert (queries, output) == (75_497_472, 234_881_024)
    assert tpla.weight_bytes - mla.weight_bytes == queries // 2 + output // 2 - down
    scatter = decode_cost(V3, H100, SCATTER, devices=2, batch=1, context=1)
    assert scatter.weight_bytes - mla.weight_bytes == queries // 2 - down


def test_break_even_of_v3_is_near_300_thousand_cached_tokens():
    even = break_even(V3, H100, TPLA, devices=2)
    assert even == (75_497_472 // 2 + 234_881_024 // 2 - 7168 * 256 * 2) / 512 == 295_936
    for batch in (9, 10):  # 9.03 requests of 32K tokens.
        costs = [decode_cost(V3, H100, scheme, devices=2, batch=batch, context=32768) for scheme in (TPLA, MLA)]
        own, other = (cost.cache_bytes + cost.weight_bytes for cost in costs)
        assert (own < other) == (batch * 32768 > even)
    assert break_even(V3, H100, MLA, devices=2) == math.inf  # Never fewer bytes than itself.
    assert break_even(V3, H100, GLA, devices=2) == 0.0
    whole, half = 374_210_560, 202_244_096  # Bytes of weights; a request in two spares 576 bytes per token.
    assert break_even(V3, H100, DATA, devices=2) == pytest.approx((whole - half) / 576)
    assert break_even(V3, H100, DATA, TPLA, devices=2) == pytest.approx((whole - 353_763_328) / (640 - 576))
    assert break_even(V3, H100, TPLA, devices=2, cache_itemsize=1) == 2 * even


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_what_must_hold_everywhere(shape, chip):
    at = {"devices": 2, "batch": 16, "context": 8192}
    cost = {scheme: decode_cost(shape, chip, scheme, **at) for scheme in BY_HAND}
    assert decode_cost(shape, chip, Scheme("tpla"), **at) == decode_cost(shape, chip, Scheme("gla"), **at) == cost[MLA]
    one = at | {"devices": 1}
    alone = [decode_cost(shape, chip, scheme, **one) for scheme in (MLA, SEQUENCE, DATA)]
    assert alone[0] == alone[1] == alone[2] and alone[0].collectives == 0 == alone[0].collective_seconds
    assert cost[SCATTER].weight_bytes < cost[TPLA].weight_bytes <= cost[DATA].weight_bytes
    assert cost[SEQUENCE].weight_bytes == cost[MLA].weight_bytes
    assert cost[SEQUENCE].cache_bytes == cost[DATA].cache_bytes == cost[MLA].cache_bytes // 2
    assert cost[GLA].attention_flops * 2 == cost[TPLA].attention_flops
    assert cost[SEQUENCE].attention_flops == cost[DATA].attention_flops == cost[MLA].attention_flops
    for scheme in BY_HAND:
        longer = decode_cost(shape, chip, scheme, **at | {"context": 16384})
        wider = decode_cost(shape, chip, scheme, **at | {"batch": 32})
        for more in (longer, wider):
            assert more.cache_bytes == 2 * cost[scheme].cache_bytes and more.seconds > cost[scheme].seconds
        assert longer.weight_bytes == wider.weight_bytes == cost[scheme].weight_bytes
        assert longer.collective_bytes == cost[scheme].collective_bytes
        padded, exact = cost[scheme].padded_attention_flops, cost[scheme].attention_flops
        assert padded >= exact and (padded > exact or chip.lane == 1)


def test_the_ratio_goes_to_that_of_the_bytes_where_memory_is_all_that_counts():
    endless = dataclasses.replace(H100, flops=1e30, link_bandwidth=1e30, collective_seconds=0.0)
    slow = dataclasses.replace(CHIPS["v5p"], flops=1e30, link_bandwidth=1e30, collective_seconds=0.0)
    for chip, limit in ((endless, 576 / 320), (slow, 640 / 384)):
        at = {"devices": 2, "batch": 32, "context": 10**9}
        mla, tpla = (decode_cost(V3, chip, scheme, **at).seconds for scheme in (MLA, TPLA))
        assert mla / tpla == pytest.approx(limit, rel=1e-4)
    # At its largest batch a step reads the whole memory, so batches decide, and the limit is the same.
    roomy = dataclasses.replace(endless, memory=1e15)
    rates = [throughput(V3, roomy, scheme, devices=2, context=2**20) for scheme in (TPLA, MLA)]
    assert rates[0] / rates[1] == pytest.approx(1.8, rel=0.01)


def test_computing_is_what_takes_long_on_h200_with_128_heads():
    """640 bytes at 85 % of 4.8 TB/s are 157 ps a token, 2 * 128 * 576 FLOP at 67 % of 989 TFLOP/s are 223 ps."""
    at = {"devices": 2, "batch": 32, "context": 32768}
    tokens = at["batch"] * at["context"]
    tpla, mla = (decode_cost(V3, CHIPS["h200"], scheme, **at) for scheme in (TPLA, MLA))
    assert tpla.attention_seconds / tokens == pytest.approx(222.5e-12, rel=1e-3)
    assert mla.attention_seconds / tokens == pytest.approx(282.4e-12, rel=1e-2)  # 1152 bytes: reading.
    kimi = decode_cost(KIMI, CHIPS["h200"], TPLA, **at)
    assert kimi.attention_seconds / tokens == pytest.approx(156.9e-12, rel=1e-2)


def test_axes_of_a_torus_add_up():
    assert [CHIPS["v5p"].link(devices) for devices in (2, 4, 8, 16)] == pytest.approx([80e9, 160e9, 240e9, 240e9])
    assert [CHIPS["v6e"].link(devices) for devices in (2, 4, 8)] == pytest.approx([80e9, 160e9, 160e9])
    assert CHIPS["h100"].link(2) == CHIPS["h100"].link(8) == pytest.approx(360e9)


def test_largest_batch_by_hand():
    """H800: 72 GB less 61 layers of 202,244,096 (MLA) or 353,763,328 (TPLA) bytes, over 32,768 tokens' caches."""
    assert max_batch(V3, H800, MLA, devices=2, context=32768) == 25  # 59.66 GB / 2.303 GB.
    assert max_batch(V3, H800, TPLA, devices=2, context=32768) == 39  # 50.42 GB / 1.279 GB.
    assert max_batch(V3, H800, DATA, devices=2, context=32768) == 2 * ((72e9 - 61 * 374_210_560) // 2_302_672_896)
    assert max_batch(V3, H800, MLA, devices=2, context=32768, other_bytes=58e9) == 0
    assert max_batch(TINY, TOY, MLA, devices=4, context=7) == (10_000 - 608) // 140
    with pytest.raises(ValueError, match="context=32768: not one request of deepseek-v3 fits on h800 by mla_tp"):
        throughput(V3, H800, MLA, devices=2, context=32768, other_bytes=58e9)
    cost = decode_cost(V3, H800, MLA, devices=2, batch=25, context=32768)
    assert throughput(V3, H800, MLA, devices=2, context=32768) == pytest.approx(25 / (61 * cost.seconds))
    rest = throughput(V3, H800, MLA, devices=2, context=32768, batch=4, other_seconds=1.0)
    assert rest == pytest.approx(4 / (1 + 61 * decode_cost(V3, H800, MLA, devices=2, batch=4, context=32768).seconds))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scheme("ring"), "kind 'ring' of a scheme: it must be one of mla_tp, tpla"),
        (lambda: Scheme("tpla", output="gather"), "output 'gather' of a scheme"),
        (lambda: Scheme("mla_tp", slices=2), "slices=2: mla_tp does not slice the latent"),
        (lambda: Scheme("tpla", slices=0), "slices=0: at least 1"),
        (lambda: Scheme("gla", slices=2, output="scatter_heads"), "only tpla has another output"),
        (lambda: tiny(Scheme("tpla", slices=3)), "slices=3 of tpla must divide devices=4"),
        (lambda: tiny(Scheme("gla", slices=3), devices=3), "slices=3 of gla must divide kv_lora_rank=8 of tiny"),
        (lambda: tiny(MLA, devices=8), "heads=4 of tiny do not divide over 8 devices"),
        (lambda: tiny(SEQUENCE, devices=3), "heads=4 of tiny do not divide over 3 devices"),
        (lambda: tiny(SCATTER, devices=8), "heads=4 of tiny do not divide over 8 devices"),
        (lambda: tiny(MLA, devices=0), "devices=0: at least 1"),
        (lambda: tiny(MLA, batch=0), "batch=0: at least 1"),
        (lambda: tiny(MLA, context=0), "context=0: at least 1"),
        (lambda: max_batch(TINY, TOY, MLA, devices=4, context=0), "context=0: at least 1"),
        (lambda: break_even(TINY, TOY, MLA, TPLA, devices=0), "devices=0: at least 1"),
    ],
)
def test_what_does_not_divide_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_page_and_the_results_are_what_the_program_gives(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/serving-cost.md").read_text()
    assert re.findall(r"^    (python .*)$", page, re.M) == ["python benchmarks/serving_cost.py"]
    spec = importlib.util.spec_from_file_location("benchmark_of_serving_cost", ROOT / "benchmarks/serving_cost.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    draw = program.draw
    monkeypatch.setattr(program, "draw", lambda results, folder: draw(results, folder, devices=(2,)))
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["serving_cost.py", f"--output={output}", f"--pictures={tmp_path / 'pictures'}"])
    program.main()
    results = json.loads(output.read_text())
    assert results == json.loads((ROOT / "benchmarks/results/serving_cost.json").read_text())
    printed = capsys.readouterr().out
    for row in results["paper"]:
        assert f"measured {row['measured']}" in printed
        assert f"{row['predicted']['layer_at_maximum_batch']:.2f}" in page  # What the page says of the paper's figures.
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn == ["serving-cost-fastest-2.svg", "serving-cost-throughput-2.svg"]
    assert all("data_parallel" in (tmp_path / "pictures" / name).read_text() for name in drawn)
    for picture in re.findall(r"\]\((pictures/.*?)\)", page):
        assert (ROOT / "docs" / picture).stat().st_size > 10_000
