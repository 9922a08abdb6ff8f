"""The memory plan: against loaded exports, against transformers' models, and against what AWS publishes."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import KINDS, tiny_config, tiny_opt
from transformers import OPTConfig, OPTForCausalLM

from optimum_opt_trn.checkpoint import load_weights, save_pretrained_split
from optimum_opt_trn.checkpoint.quantization import quantization_config
from optimum_opt_trn.configuration_opt import OPTNeuronConfig
from optimum_opt_trn.hardware import INSTANCES, GiB, Instance
from optimum_opt_trn.model.attention import allocate_cache
from optimum_opt_trn.model.parallel import RankGroup
from optimum_opt_trn.planning.host import this_host
from optimum_opt_trn.planning.memory import (
    NEURON_RESERVE,
    SCRATCHPAD_PAGE,
    cheapest,
    checkpoint_bytes,
    max_batch_size,
    max_sequence_length,
    plan_memory,
    rank_tensors,
    smallest_degree,
    tp_degrees,
)
from optimum_opt_trn.planning.setup import OPTShape, Setup
from optimum_opt_trn.planning.workspace import CONTEXT_ENCODING, cpu_buffers


def family(hidden: int, layers: int, heads: int) -> OPTConfig:
    """A large model of the family (Zhang et al., 2022, table 1)."""
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


OPT_13B, OPT_30B, OPT_66B = family(5120, 40, 40), family(7168, 48, 56), family(9216, 64, 72)
TRN1, INF2 = INSTANCES["trn1.2xlarge"], INSTANCES["inf2.48xlarge"]


def tensors_of(directory: Path, config: OPTConfig, neuron_config: OPTNeuronConfig, ranks) -> int:
    """Bytes of the distinct weight and cache tensors of `ranks`."""
    group = RankGroup(neuron_config.tp_degree, ranks)
    weights = load_weights(directory, config, neuron_config, group)
    parts = [weights.embed, weights.head, *weights.layers]
    loaded = [t for part in parts for shards in part.values() for t in shards]
    cache = allocate_cache(config, neuron_config, group)
    held = [*loaded, *(t for layer in cache for t in (*layer.keys, *layer.values))]
    return sum({(t.data_ptr(), t.shape): t.nbytes for t in held}.values())


@pytest.mark.parametrize("amp", ["f16", "f32"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_cache_are_those_that_are_loaded(kind, amp, tmp_path):
    model = tiny_opt(**KINDS[kind])
    directory = save_pretrained_split(model, tmp_path, amp)
    for degree, batch in ((1, 1), (2, 3), (4, 2)):
        neuron_config = OPTNeuronConfig(
            batch_size=batch, sequence_length=64, tp_degree=degree, amp=amp, kv_cache_dtype="bf16"
        )
        setup = Setup.of(neuron_config)
        whole = plan_memory(model.config, setup, this_host())
        expected = tensors_of(directory, model.config, neuron_config, range(degree))
        assert sum(whole.weights.values()) + whole.cache == expected
        for rank in range(degree):
            plan = plan_memory(model.config, setup, INF2)
            assert sum(plan.weights.values()) + plan.cache == tensors_of(
                directory, model.config, neuron_config, [rank]
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_every_parameter(kind):
    config = tiny_config(**KINDS[kind])
    parameters = sum(tensor.numel() for tensor in tiny_opt(**KINDS[kind]).parameters())
    assert sum(t.count * torch.Size(t.shape).numel() for t in rank_tensors(config, Setup())) == parameters


def test_the_disk_is_the_split_checkpoint(tmp_path):
    model = tiny_opt(**KINDS["untied"])
    directory = save_pretrained_split(model, tmp_path, "f16")
    files = [file.stat().st_size for file in directory.glob("*.safetensors")]
    total, largest = checkpoint_bytes(model.config, Setup())
    header = 4096  # at most, of a safetensors file with these few names
    assert total <= sum(files) <= total + header * len(files)
    assert largest <= max(files) <= largest + header


def test_int8_has_a_byte_an_element_and_a_scale_a_channel():
    plan = plan_memory(OPT_13B, Setup(weight_dtype="int8"), TRN1)
    matrices, channels, embedding = 12 * 5120**2 * 40, (5 * 5120 + 20480) * 40, 50272 * 5120
    biases, floats = (5 * 5120 + 20480) * 40, 40 * 4 * 5120 + 2 * 5120 + 2050 * 5120
    layers = matrices + 4 * channels + 2 * biases + 4 * floats
    assert sum(plan.weights.values()) == layers + 2 * embedding + embedding + 4 * 50272
    kept = OPTConfig(**{**OPT_13B.to_dict(), "quantization_config": quantization_config(head=False)})
    assert sum(plan_memory(kept, Setup(weight_dtype="int8"), TRN1).weights.values()) == layers + 2 * embedding
    assert plan.cache == 2 * 40 * 2048 * 5120 * 2


def test_opt_13b_on_a_trn1_2xlarge_fits_at_batch_2_and_not_at_3():
    left = {}
    for batch in (1, 2, 3):
        plan = plan_memory(OPT_13B, Setup(batch, 2048, 2), TRN1)
        left[batch] = plan.instance.core_bytes - sum(plan.weights.values()) - plan.cache
        assert plan.fits == (batch < 3)
        assert plan.free == left[batch] - plan.workspace - plan.reserve
    assert 0.6e9 <= left[3] <= 1.8e9
    assert max_batch_size(OPT_13B, Setup(1, 2048, 2), TRN1) == 2
    assert plan.reserve == NEURON_RESERVE


def test_the_reserve_holds_however_scores_and_pages_are_counted():
    """In the program that the statement is about, which ran the prompts of all rows at once."""
    two, three = (plan_memory(OPT_13B, Setup(batch, 2048, 2), TRN1) for batch in (2, 3))
    for scores in (0, 1):
        for page in (1, SCRATCHPAD_PAGE):
            free = []
            for plan in (two, three):
                needed = plan.setup.batch_size * (plan.graphs[CONTEXT_ENCODING] + scores * plan.scores)
                free.append(plan.free + plan.workspace - -(-needed // page) * page)
            assert free[0] >= 0 > free[1]


def test_opt_66b_is_awss_sizing_example_with_embeddings():
    setup = Setup(16, 2048, 24)
    total = checkpoint_bytes(OPT_66B, setup)[0] + 24 * plan_memory(OPT_66B, setup, INF2).cache
    embeddings = 50272 * 9216 * 2
    assert total == pytest.approx(193.5 * GiB + embeddings, rel=0.03)
    # Their inf2 example needs 24 cores.
    assert smallest_degree(OPT_66B, Setup(16, 2048), INF2) == 24
    assert cheapest(OPT_66B, Setup(16, 2048)) == (INF2, 24)


@pytest.mark.parametrize(("config", "published"), [(OPT_13B, 29e9), (OPT_30B, 66e9)])
def test_what_aws_says_of_batch_1_are_the_sums_of_batch_2(config, published):
    totals = {b: checkpoint_bytes(config, Setup())[0] + plan_memory(config, Setup(b), INF2).cache for b in (1, 2)}
    assert totals[2] == pytest.approx(published, rel=0.01)
    assert totals[1] < 0.96 * published


def test_workspace_is_in_pages_shared_by_the_graphs_only_on_neuron():
    setup = Setup(128, 2048, 2)
    plan = plan_memory(OPT_13B, setup, TRN1)
    assert plan.workspace == 2 * SCRATCHPAD_PAGE >= max(plan.graphs.values()) > SCRATCHPAD_PAGE
    host = plan_memory(OPT_13B, setup, this_host())
    assert host.workspace == max(host.graphs.values())
    assert host.reserve == cpu_buffers(OPT_13B, len(os.sched_getaffinity(0)))


def test_degrees_are_the_runtimes_that_divide_the_heads():
    assert tp_degrees(OPT_13B, INSTANCES["inf2.48xlarge"]) == (1, 2, 4, 8)
    assert tp_degrees(OPT_66B, INSTANCES["inf2.48xlarge"]) == (1, 2, 4, 8, 12, 24)
    assert tp_degrees(OPT_13B, INSTANCES["trn1.32xlarge"]) == (1, 2, 8)
    assert tp_degrees(tiny_config(), this_host()) == (1, 2, 4)


@given(heads=st.integers(1, 60), ffn_dim=st.integers(1, 60), supported=st.sets(st.integers(1, 60), max_size=8))
def test_degrees_leave_no_rest(heads, ffn_dim, supported):
    instance = replace(TRN1, cores=60, family=replace(TRN1.family, tp_degrees=tuple(sorted(supported))))
    config = OPTShape(num_attention_heads=heads, ffn_dim=ffn_dim)
    found = tp_degrees(config, instance)
    for degree in supported or range(1, 61):
        assert (degree in found) == (heads % degree == ffn_dim % degree == 0)
    assert supported or found == tp_degrees(config)


def small(core_bytes: int) -> Instance:
    return replace(TRN1, core_bytes=core_bytes)


@given(
    core=st.integers(1, 40),
    batch=st.integers(1, 64),
    length=st.integers(4, 2048),
    degree=st.sampled_from([1, 2, 8]),
    amp=st.sampled_from(["f16", "f32"]),
    weights=st.sampled_from([None, "int8"]),
)
def test_limits_are_the_last_that_fit(core, batch, length, degree, amp, weights):
    setup, instance = Setup(batch, length, degree, amp, weight_dtype=weights), small(core * GiB)

    def fits(**changes) -> bool:
        return plan_memory(OPT_13B, replace(setup, **changes), instance).fits

    largest = max_batch_size(OPT_13B, setup, instance)
    assert not largest or fits(batch_size=largest)
    assert not fits(batch_size=largest + 1)
    longest = max_sequence_length(OPT_13B, setup, instance)
    assert not longest or fits(sequence_length=longest)
    assert longest == 2048 or not fits(sequence_length=longest + 1)
    assert fits() == (batch <= largest) == (length <= longest)


def test_a_reference_model_has_the_planned_bytes():
    config = tiny_config()
    model = OPTForCausalLM(config)
    expected = sum(p.numel() * p.element_size() for p in model.float().parameters())
    assert sum(plan_memory(config, Setup(amp="f32"), this_host()).weights.values()) == expected
