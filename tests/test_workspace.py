"""The workspace against what the rank program allocates when it runs."""

import weakref

import pytest
import torch
from conftest import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_opt_trn.checkpoint.layout import layer_specs, outer_specs
from optimum_opt_trn.configuration_opt import OPTNeuronConfig
from optimum_opt_trn.kv_cache import allocate_cache
from optimum_opt_trn.memory import Setup
from optimum_opt_trn.modeling_opt import OPTRankProgram
from optimum_opt_trn.parallel import RankGroup, shard_dim
from optimum_opt_trn.sampling import Selection, select_tokens
from optimum_opt_trn.workspace import CONTEXT_ENCODING, TOKEN_GENERATION, graph_workspace, prompt_scores


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still there."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage._cdata in given or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def shards(specs, group: RankGroup, amp: torch.dtype):
    weights = {}
    for name, spec in specs.items():
        dim, tensor = shard_dim(name), torch.ones(spec.shape, dtype=spec.dtype(amp))
        parts = [tensor] if dim is None else list(tensor.chunk(group.world_size, dim))
        weights[name.removeprefix("model.decoder.")] = parts
    return weights


def widest(config, neuron_config, group, n: int, prompt: bool) -> int:
    """Bytes that one layer and the head allocate beside weights and cache, the layer's input included."""
    program = OPTRankProgram(config, group)
    layer = shards(layer_specs(config), group, neuron_config.amp_dtype)
    head = shards(outer_specs(config), group, neuron_config.amp_dtype)
    head.setdefault("lm_head.weight", head["embed_tokens.weight"])
    cache = allocate_cache(config, neuron_config, group)[0]
    batch = neuron_config.batch_size
    positions = torch.arange(n, dtype=torch.int32).repeat(batch, 1)
    keys, values = cache.first(n if prompt else neuron_config.sequence_length)
    with torch.inference_mode(), Allocations() as allocations:
        hidden = torch.ones(batch, n, config.hidden_size) + 0
        program.layer(layer, hidden, keys, values, positions, prompt=False)  # as the CPU target runs prompts, too
        logits = program.logits(head, hidden[:, -1])
        greedy = Selection.greedy(batch)
        select_tokens(logits, greedy.params, greedy.uniforms, greedy.suppressed, neuron_config.max_topk)
    return allocations.peak


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("amp", ["f16", "f32"])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch_size": 2, "sequence_length": 512},  # scores are most of it
        {"batch_size": 8, "sequence_length": 16},  # the MLP is
        {"batch_size": 1, "sequence_length": 4, "vocab_size": 20000},  # the head is
    ],
    ids=["scores", "mlp", "head"],
)
def test_on_cpu_it_is_what_an_eager_run_allocates(shape, amp, tp_degree):
    shape = dict(shape)
    overrides = {"vocab_size": shape.pop("vocab_size")} if "vocab_size" in shape else {}
    config = tiny_config(
        hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, max_position_embeddings=512, **overrides
    )
    neuron_config = OPTNeuronConfig(**shape, amp=amp, tp_degree=tp_degree)
    group = RankGroup(tp_degree, range(tp_degree))
    graphs = graph_workspace(config, Setup.of(neuron_config), on_neuron=False)
    for name, n in ((CONTEXT_ENCODING, neuron_config.sequence_length), (TOKEN_GENERATION, 1)):
        measured = widest(config, neuron_config, group, n, name == CONTEXT_ENCODING)
        # Indices of a few rows, and the best tokens of each, are not counted.
        assert graphs[name] == pytest.approx(measured, rel=0.02, abs=12 * 1024)


def test_on_neuron_it_is_of_the_size_of_hidden_states_and_the_scores_are_apart():
    config = tiny_config(hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, max_position_embeddings=512)
    setup = Setup(batch_size=2, sequence_length=512, tp_degree=2)
    # The residual, what the MLP adds to it and its 256 inner units in float32, the layernorm in float16.
    assert graph_workspace(config, setup, on_neuron=True)[CONTEXT_ENCODING] == 2 * 512 * (
        4 * (128 + 128 + 256) + 2 * 128
    )
    # Two of the four heads, each position with each other, in float32.
    assert prompt_scores(config, setup) == 2 * 2 * 512 * 512 * 4
