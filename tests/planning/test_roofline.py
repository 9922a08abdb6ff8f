"""The roofline, against sums by hand and AWS's measurements of OPT."""

import pytest
from small_models import tiny_config
from test_memory import INF2, OPT_13B, OPT_30B, OPT_66B, TRN1

from optimum_opt_trn.hardware import GiB
from optimum_opt_trn.planning.host import this_host
from optimum_opt_trn.planning.memory import plan_memory
from optimum_opt_trn.planning.roofline import REALISTIC_SHARE, decode_curve, roofline
from optimum_opt_trn.planning.setup import Setup


def test_a_step_reads_weights_and_cache_once():
    plan = plan_memory(OPT_13B, Setup(2, 2048, 2), TRN1)
    line = roofline(OPT_13B, plan)
    positions = 2050 * 5120 * 4
    assert line.decode_bytes == sum(plan.weights.values()) - positions + plan.cache
    assert line.decode_seconds == pytest.approx(line.decode_bytes / (410 * GiB))
    assert line.decode_tokens_per_second == pytest.approx(2 / line.decode_seconds)


def test_of_an_untied_embedding_only_rows_are_read():
    tied, untied = tiny_config(), tiny_config(tie_word_embeddings=False)
    reads = [roofline(config, plan_memory(config, Setup(1, 128), TRN1)).decode_bytes for config in (tied, untied)]
    assert reads[0] == reads[1]


def test_an_int8_head_is_read_and_the_embedding_is_not():
    setup = Setup(2, 2048, 2, weight_dtype="int8")
    plan = plan_memory(OPT_13B, setup, TRN1)
    line = roofline(OPT_13B, plan)
    embedding, positions = 50272 * 5120 * 2 // 2, 2050 * 5120 * 4
    assert line.decode_bytes == sum(plan.weights.values()) - embedding - positions + plan.cache
    in_16_bits = roofline(OPT_13B, plan_memory(OPT_13B, Setup(2, 2048, 2), TRN1))
    assert line.prefill_flops == in_16_bits.prefill_flops


def test_a_prefill_multiplies_every_token_with_every_matrix():
    line = roofline(OPT_13B, plan_memory(OPT_13B, Setup(2, 2048, 2), TRN1))
    matrices, attention, head = 12 * 5120**2 * 40, 2 * 2048 * 5120 * 40, 50272 * 5120
    by_hand = 2 * (4096 * (matrices + attention) + 2 * head) / 2
    assert line.prefill_flops == pytest.approx(by_hand)
    assert line.prefill_seconds == pytest.approx(by_hand / 95e12)
    assert line.prompt_tokens == 4096


def test_a_short_prefill_is_bound_by_the_weights():
    line = roofline(OPT_13B, plan_memory(OPT_13B, Setup(1, 16, 2), TRN1))
    assert line.prefill_seconds == pytest.approx(line.decode_seconds)


@pytest.mark.parametrize(
    ("config", "degree", "milliseconds"), [(OPT_13B, 8, 19.8), (OPT_30B, 8, 40.1), (OPT_66B, 24, 35.4)]
)
def test_the_realistic_share_is_what_aws_measured(config, degree, milliseconds):
    line = roofline(config, plan_memory(config, Setup(1, 2048, degree), INF2))
    assert line.decode_seconds / (milliseconds / 1e3) == pytest.approx(REALISTIC_SHARE, abs=0.05)


def test_more_rows_give_more_tokens_but_fewer_each():
    plan = plan_memory(OPT_13B, Setup(1, 2048, 2), TRN1)
    one, two, four = decode_curve(OPT_13B, plan, [1, 2, 4])
    assert one < two < 2 * one
    assert two < four < 2 * two


def test_there_is_none_of_a_host_whose_bandwidth_nobody_knows():
    config = tiny_config()
    plan = plan_memory(config, Setup(1, 128), this_host())
    assert roofline(config, plan) is None
    assert decode_curve(config, plan, [1, 2]) == []
