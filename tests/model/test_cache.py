"""The key/value cache."""

import pytest
from small_models import tiny_config

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.model.attention import allocate_cache
from optimum_opt_trn.model.parallel import RankGroup
from optimum_opt_trn.model.shapes import cache_shape


@pytest.mark.parametrize("tp_degree", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_allocation(tp_degree, dtype):
    config = tiny_config(num_hidden_layers=3, hidden_size=48, num_attention_heads=4)
    neuron_config = OPTNeuronConfig(batch_size=3, sequence_length=20, tp_degree=tp_degree, kv_cache_dtype=dtype)
    cache = allocate_cache(config, neuron_config, RankGroup(tp_degree, range(tp_degree)))
    assert len(cache) == 3
    tensors = [t for layer in cache for t in (*layer.keys, *layer.values)]
    assert len(tensors) == 2 * 3 * tp_degree
    for tensor in tensors:
        assert tuple(tensor.shape) == cache_shape(config, neuron_config) == (3, 4 // tp_degree, 20, 12)
        assert tensor.dtype == neuron_config.cache_dtype
        assert not tensor.any()
    assert len({t.data_ptr() for t in tensors}) == len(tensors)  # each its own memory


def test_only_local_ranks_are_allocated():
    neuron_config = OPTNeuronConfig(sequence_length=20, tp_degree=4)
    layer = allocate_cache(tiny_config(), neuron_config, RankGroup(4, (2,)))[0]
    assert len(layer.keys) == len(layer.values) == 1


def test_memory_does_not_depend_on_the_degree():
    def total(tp_degree: int) -> int:
        neuron_config = OPTNeuronConfig(batch_size=2, sequence_length=32, tp_degree=tp_degree)
        cache = allocate_cache(tiny_config(), neuron_config, RankGroup(tp_degree, range(tp_degree)))
        return sum(t.nbytes for layer in cache for t in (*layer.keys, *layer.values))

    # keys and values x layers x batch x positions x hidden x 2 bytes
    assert total(1) == total(2) == total(4) == 2 * 2 * 2 * 32 * 64 * 2
