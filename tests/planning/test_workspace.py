"""The workspace against the bytes that PyTorch's allocator returns while the model runs."""

from itertools import accumulate

import pytest
import torch
from small_models import KINDS, tiny_config
from torch.profiler import ProfilerActivity, profile

from optimum_opt_trn.checkpoint import ModelWeights
from optimum_opt_trn.checkpoint.layout import layer_specs, outer_specs
from optimum_opt_trn.configuration_opt import OPTNeuronConfig
from optimum_opt_trn.dtypes import to_torch
from optimum_opt_trn.generation.inputs import pack
from optimum_opt_trn.model.parallel import RankGroup, shard_dim, shard_range
from optimum_opt_trn.model.sampling import MAX_SUPPRESSED, SamplingInputs
from optimum_opt_trn.planning.setup import Setup
from optimum_opt_trn.planning.workspace import (
    CONTEXT_ENCODING,
    SPECULATION,
    TOKEN_GENERATION,
    captured_bytes,
    graph_workspace,
    prompt_scores,
)
from optimum_opt_trn.targets.cpu.kernels import KernelArithmetic
from optimum_opt_trn.targets.cpu.runtime import CPURuntime


def shards(specs, group: RankGroup) -> dict[str, list[torch.Tensor]]:
    weights = {}
    for name, spec in specs.items():
        dim, shape = shard_dim(name), list(spec.shape)
        if dim is not None:
            start, stop, padding = shard_range(shape[dim], 0, group.tp_degree)
            shape[dim] = stop - start + padding
        copies = 1 if dim is None else group.tp_degree
        tensor = torch.full(shape, 0.01, dtype=to_torch(spec.dtype))
        weights[name.removeprefix("model.decoder.")] = [tensor] * copies
    return weights


def runtime(config, neuron_config) -> CPURuntime:
    degree, amp = neuron_config.tp_degree, neuron_config.amp
    group = RankGroup(degree, range(degree), KernelArithmetic())
    outer = shards(outer_specs(config, amp), group)
    outer.setdefault("lm_head.weight", outer["embed_tokens.weight"])
    layers = [shards(layer_specs(config, amp), group) for _ in range(config.num_hidden_layers)]
    return CPURuntime(
        config, neuron_config, group, ModelWeights(outer, layers, outer, torch.arange(degree, dtype=torch.int32))
    )


def allocated(run) -> int:
    """The most bytes that PyTorch's CPU allocator had allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def measured(config, neuron_config) -> dict[str, int]:
    """The bytes that each graph allocates, with the sampling that needs most."""
    model, batch, length = runtime(config, neuron_config), neuron_config.batch_size, neuron_config.sequence_length
    sampling = SamplingInputs.greedy(batch)
    sampling.params[:, 0] = neuron_config.max_topk
    sampling.suppressed[:] = torch.arange(MAX_SUPPRESSED, dtype=torch.int32)
    ids, mask = torch.ones(batch, length, dtype=torch.int32), torch.ones(batch, length, dtype=torch.bool)
    slots, empty = list(range(batch)), torch.zeros(batch, dtype=torch.int64)

    def step(columns: int, filled: torch.Tensor) -> None:
        model.step(pack(ids[:, :columns], mask[:, :columns], slots, filled, 1, sampling))

    step(1, empty)  # captured layers keep their buffers
    return {
        CONTEXT_ENCODING: allocated(lambda: step(length, empty)),
        TOKEN_GENERATION: allocated(lambda: step(1, empty + length - 1)),
    }


SHAPES: dict[str, dict] = {
    "attention": {"batch_size": 1, "sequence_length": 512, "ffn_dim": 192},
    "attention of several slots": {"batch_size": 3, "sequence_length": 300, "ffn_dim": 192},
    "a short prompt": {"batch_size": 1, "sequence_length": 49, "ffn_dim": 192},
    "the MLP": {"batch_size": 4, "sequence_length": 100},
}


@pytest.mark.parametrize("tp_degree", [1, 2, 4, 8])
@pytest.mark.parametrize("amp", ["f16", "f32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_cpu_a_prompts_is_to_the_byte_what_is_allocated(shape, amp, tp_degree):
    check_prompt(shape, amp, tp_degree)


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_on_cpu_it_is_so_for_every_kind_of_opt(kind, tp_degree):
    check_prompt({"batch_size": 2, "sequence_length": 40, **KINDS[kind]}, "f16", tp_degree)


def check_prompt(shape: dict, amp: str, tp_degree: int) -> None:
    fields = {"batch_size", "sequence_length"}
    options = {"hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768, "num_attention_heads": 8}
    options |= {"max_position_embeddings": 512, **{name: n for name, n in shape.items() if name not in fields}}
    config = tiny_config(**options)
    neuron_config = OPTNeuronConfig(**{name: shape[name] for name in fields}, amp=amp, tp_degree=tp_degree)
    planned = graph_workspace(config, Setup.of(neuron_config), on_neuron=False)
    assert planned[CONTEXT_ENCODING] == measured(config, neuron_config)[CONTEXT_ENCODING]


@pytest.mark.parametrize("tp_degree", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_on_cpu_captured_layers_hold_what_is_planned(kind, tp_degree):
    config = tiny_config(num_hidden_layers=5, **KINDS[kind])
    model = runtime(config, OPTNeuronConfig(batch_size=2, sequence_length=48, tp_degree=tp_degree))
    slots, zeros = [0, 1], torch.zeros(2, dtype=torch.int64)
    for tokens in (1, 20, 24):
        ids, mask = torch.ones(2, tokens, dtype=torch.int32), torch.ones(2, tokens, dtype=torch.bool)
        model.step(pack(ids, mask, slots, zeros, 1, SamplingInputs.greedy(2)))
    held = [] if model.captured is None else [*vars(model.captured).values(), *model.captured._buffers.all.values()]
    assert captured_bytes(config) == sum(one.nbytes for one in held if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
def test_on_cpu_a_heads_is_what_is_allocated_but_for_the_best_tokens(tp_degree):
    config = tiny_config(vocab_size=20001)
    neuron_config = OPTNeuronConfig(batch_size=3, sequence_length=17, tp_degree=tp_degree)
    found = measured(config, neuron_config)
    planned = graph_workspace(config, Setup.of(neuron_config), on_neuron=False)
    # 37 bytes for each of the best tokens (its number, value, weight and so on), where that is the widest moment: of
    # several ranks, joining their logits is.
    best = 37 * neuron_config.max_topk * neuron_config.batch_size if tp_degree == 1 else 0
    for graph in (CONTEXT_ENCODING, TOKEN_GENERATION):
        assert planned[graph] == pytest.approx(found[graph] - best, abs=2048)


def test_on_neuron_it_has_the_size_of_hidden_states_without_scores():
    config = tiny_config(hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, max_position_embeddings=512)
    setup = Setup(batch_size=2, sequence_length=512, tp_degree=2)
    # The residual, the MLP's summand and its 256 inner units in float32, the layernorm in float16.
    # A prompt is one row, whatever the batch size.
    assert graph_workspace(config, setup, on_neuron=True)[CONTEXT_ENCODING] == 512 * (4 * (128 + 128 + 256) + 2 * 128)
    # Two of the four heads, all pairs of positions, in float32.
    assert prompt_scores(config, setup) == 2 * 512 * 512 * 4


def test_on_neuron_the_rows_of_a_batch_share_calls_for_new_tokens():
    config = tiny_config(hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, max_position_embeddings=512)
    for batch in (3, 64):
        planned = graph_workspace(config, Setup(batch, 512, 2), on_neuron=True)
        # Residual, summand, half of query, key, value and result in float32, layernorm in float16; and for two of the
        # four heads, scores of 512 cached positions and of the new tokens, before and after the softmax.
        for graph, tokens in ((TOKEN_GENERATION, 1), (SPECULATION, 16)):
            hidden = 128 * (4 + 4 + 4 * 4 // 2 + 2)
            assert planned[graph] == batch * tokens * (hidden + 2 * 2 * (512 + tokens) * 4)
    assert planned[SPECULATION] > planned[CONTEXT_ENCODING]


def test_on_neuron_a_large_vocabulary_is_the_most_of_a_small_model():
    config = tiny_config(vocab_size=10001)
    planned = graph_workspace(config, Setup(2, 16, 4), on_neuron=True)
    # Of four ranks 2,501 words each: the rank's logits and all ranks', and the rank's without suppressed words.
    for graph, wanted, rows in ((CONTEXT_ENCODING, 1, 1), (TOKEN_GENERATION, 2, 2), (SPECULATION, 32, 2)):
        assert planned[graph] == 4 * (wanted * (config.hidden_size + 2501 * 5) + rows * 2501)
