"""OPTNeuronConfig: what it accepts, what it refuses, and how it is saved and copied."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from requirements import needs_optimum_neuron

from optimum_opt_trn.configuration_opt import (
    FORMAT_VERSION,
    OPTNeuronConfig,
    reject_unknown,
)
from optimum_opt_trn.hardware import FAMILIES
from optimum_opt_trn.host_framework import optimum_neuron_version


@st.composite
def options(draw) -> dict:
    """Valid options, some of them left out."""
    length = draw(st.integers(4, 4096))
    sizes = st.sets(st.integers(2, max(2, length - 1)), max_size=4)
    buckets = sizes.map(lambda s: (*sorted(n for n in s if n < length), length))
    every = {
        "batch_size": draw(st.integers(1, 64)),
        "sequence_length": length,
        "tp_degree": draw(st.integers(1, 64)),
        "amp": draw(st.sampled_from(["f16", "bf16", "f32"])),
        "kv_cache_dtype": draw(st.sampled_from(["f16", "bf16", "f32"])),
        "max_topk": draw(st.integers(1, 5000)),
        "instance_type": draw(st.sampled_from(list(FAMILIES))),
        "prompt_buckets": draw(buckets),
        "cache_buckets": draw(buckets),
        "checkpoint_id": draw(st.none() | st.text(max_size=20)),
        "checkpoint_revision": draw(st.none() | st.text(max_size=20)),
    }
    left_out = draw(st.sets(st.sampled_from([name for name in every if name != "sequence_length"])))
    return {name: value for name, value in every.items() if name not in left_out}


def test_defaults():
    config = OPTNeuronConfig()
    assert config.options() == {
        "batch_size": 1,
        "sequence_length": 2048,
        "tp_degree": 1,
        "amp": "f16",
        "weight_dtype": None,
        "kv_cache_dtype": "f16",
        "max_topk": 256,
        "instance_type": "cpu",
        "target": "cpu",
        "prompt_buckets": (2048,),
        "cache_buckets": (2048,),
        "prompt_embeddings": False,
        "adapter": (),
        "checkpoint_id": None,
        "checkpoint_revision": None,
        "format_version": FORMAT_VERSION,
    }


@pytest.mark.parametrize(
    ("alias", "name", "dtype"),
    [
        *((alias, "f16", torch.float16) for alias in ("f16", "fp16", "float16", "half", "torch.float16", torch.half)),
        *((alias, "bf16", torch.bfloat16) for alias in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16)),
        *((alias, "f32", torch.float32) for alias in ("f32", "fp32", "float32", "float", torch.float32)),
    ],
)
def test_dtype_aliases(alias, name, dtype):
    config = OPTNeuronConfig(amp=alias)
    assert (config.amp, config.kv_cache_dtype) == (name, name)  # the cache follows
    assert config.amp_dtype == config.torch_dtype == config.cache_dtype == dtype
    cache = OPTNeuronConfig(amp="bf16", kv_cache_dtype=alias)
    assert (cache.amp, cache.kv_cache_dtype, cache.cache_dtype) == ("bf16", name, dtype)


@pytest.mark.parametrize("instance_type", FAMILIES)
def test_compile_target_follows_from_the_instance_family(instance_type):
    config = OPTNeuronConfig(instance_type=instance_type)
    assert config.target == {"cpu": "cpu", "trn2": "trn2"}.get(instance_type, "trn1")
    assert OPTNeuronConfig(instance_type=instance_type, target=config.target) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a positive whole number"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"tp_degree": 0}, "tp_degree=0"),
        ({"tp_degree": "2"}, "tp_degree='2'"),
        ({"max_topk": 0}, "max_topk=0"),
        ({"sequence_length": None}, "sequence_length=None"),
        ({"sequence_length": 3}, "sequence_length=3 is too short: the least is 4"),
        ({"amp": "int8"}, "amp='int8'.*choose f16, bf16 or f32"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'.*choose f16, bf16 or f32"),
        ({"instance_type": "p4d"}, "instance_type='p4d' is not one of cpu, trn1, trn1n, inf2, trn2"),
        ({"target": "trn1"}, "target='trn1' does not fit instance_type='cpu'"),
        ({"instance_type": "inf2", "target": "inf2"}, "whose target is 'trn1'"),
        ({"sequence_length": 64, "prompt_buckets": (16, 32)}, r"prompt_buckets=\[16, 32\].*example \[16, 32, 64\]"),
        ({"sequence_length": 64, "cache_buckets": (32, 16, 64)}, r"cache_buckets.*example \[16, 32, 64\]"),
    ],
)
def test_values_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        OPTNeuronConfig(**wrong)


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("tp_degre", "tp_degree"), ("batchsize", "batch_size"), ("kv_dtype", "kv_cache_dtype"), ("seq_length", "length")],
)
def test_unknown_option_names_the_nearest(typo, nearest):
    with pytest.raises(TypeError, match=f"OPTNeuronConfig has no option '{typo}': did you mean .*{nearest}"):
        OPTNeuronConfig(**{typo: 2})
    with pytest.raises(TypeError, match=f"no option '{typo}'.*{nearest}"):
        OPTNeuronConfig.from_dict({**OPTNeuronConfig().to_dict(), typo: 2})


def test_unknown_option_that_is_near_nothing_gets_the_list():
    with pytest.raises(TypeError, match="known options: adapter, amp, batch_size, .*tp_degree"):
        OPTNeuronConfig(zzz=1)
    with pytest.raises(TypeError, match="somewhere has no option 'b': known options: xyz"):
        reject_unknown({"b": 1}, ["xyz"], "somewhere")
    reject_unknown({}, [], "somewhere")
    reject_unknown(["a"], iter(["b", "a"]), "somewhere")


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        OPTNeuronConfig(2)


@settings(deadline=None, max_examples=40)
@given(options())
def test_round_trips(given_options):
    config = OPTNeuronConfig(**given_options)
    assert given_options.items() <= config.options().items()
    for twin in (
        OPTNeuronConfig(**config.options()),
        OPTNeuronConfig.from_dict(config.to_dict()),
        OPTNeuronConfig.from_dict(json.loads(config.to_json_string())),
        eval(repr(config), {"OPTNeuronConfig": OPTNeuronConfig}),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
        assert repr(twin) == repr(config)
        assert twin.options() == config.options()
        with pytest.raises(AttributeError):
            twin.batch_size = 1


@settings(deadline=None, max_examples=10)
@given(options())
def test_file_round_trip(tmp_path_factory, given_options):
    directory = tmp_path_factory.mktemp("config")
    config = OPTNeuronConfig(**given_options)
    config.save_pretrained(directory)
    assert OPTNeuronConfig.from_pretrained(directory) == config
    written = json.loads((directory / "neuron_config.json").read_text())
    assert written["_serialized_key"] == "OPTNeuronConfig"
    assert written["optimum_neuron_version"] == optimum_neuron_version
    assert written["target"] == config.target


def test_from_dict_does_not_change_its_argument():
    written = OPTNeuronConfig().to_dict()
    before = copy.deepcopy(written)
    OPTNeuronConfig.from_dict(written)
    assert written == before


@settings(deadline=None, max_examples=30)
@given(options(), options())
def test_equality_is_that_of_the_options(first, second):
    a, b = OPTNeuronConfig(**first), OPTNeuronConfig(**second)
    assert (a == b) == (a.options() == b.options())
    assert a != a.options()
    assert len({a, b, OPTNeuronConfig(**first)}) == len({repr(a), repr(b)})


@pytest.mark.parametrize("name", [*OPTNeuronConfig.option_names(), "_frozen", "new_attribute"])
def test_immutable(name):
    config = OPTNeuronConfig(sequence_length=128)
    before = config.options()
    with pytest.raises(AttributeError, match=f"immutable: {name} is decided at export"):
        setattr(config, name, 1)
    with pytest.raises(AttributeError):
        delattr(config, name)
    assert config.options() == before


@pytest.mark.parametrize("versions", [{"optimum_neuron_version": "99.0.0"}, {"neuronxcc_version": "2.0"}])
def test_file_of_another_optimum_neuron_loads(tmp_path, versions):
    config = OPTNeuronConfig(batch_size=3)
    (tmp_path / "neuron_config.json").write_text(json.dumps({**config.to_dict(), **versions}))
    assert OPTNeuronConfig.from_pretrained(tmp_path) == config


def test_file_without_foreign_versions_loads():
    written = OPTNeuronConfig(batch_size=3).to_dict()
    del written["optimum_neuron_version"], written["neuronxcc_version"]
    assert OPTNeuronConfig.from_dict(written) == OPTNeuronConfig(batch_size=3)


def test_newer_format_is_refused():
    newer = {**OPTNeuronConfig().to_dict(), "format_version": FORMAT_VERSION + 1}
    with pytest.raises(ValueError, match=f"format {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}: upgrade"):
        OPTNeuronConfig.from_dict(newer)


@pytest.mark.parametrize(
    "foreign",
    [
        {"_serialized_key": "NxDNeuronConfig", "batch_size": 1},
        {"_serialized_key": "OPTNeuronConfig", "batch_size": 1},
        {"_serialized_key": "OPTNeuronConfig", "format_version": "1"},
        {},
    ],
)
def test_dictionaries_that_are_not_ours(foreign):
    with pytest.raises(ValueError, match="not for an OPT export.*optimum-cli export neuron"):
        OPTNeuronConfig.from_dict(foreign)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(OSError, match="neuron_config.json"):
        OPTNeuronConfig.from_pretrained(tmp_path)
    (tmp_path / "neuron_config.json").write_text('{"batch_size": ')
    with pytest.raises(OSError, match="JSON"):
        OPTNeuronConfig.from_pretrained(tmp_path)


@needs_optimum_neuron
@settings(deadline=None, max_examples=20)
@given(options())
def test_optimum_neurons_generic_loader_can_make_it(given_options):
    from optimum.neuron.configuration_utils import _NEURON_CONFIG_FOR_KEY

    config = OPTNeuronConfig(**given_options)
    # What NeuronConfig.from_dict does after its checks of versions, which need the SDK.
    values = json.loads(config.to_json_string())
    for key in ("optimum_neuron_version", "neuronxcc_version"):
        values.pop(key)
    assert _NEURON_CONFIG_FOR_KEY[values.pop("_serialized_key")](**values) == config


def test_default_buckets_suit_the_target():
    assert OPTNeuronConfig(sequence_length=100).prompt_buckets == (100,)
    neuron = OPTNeuronConfig(sequence_length=1000, instance_type="trn1")
    assert neuron.prompt_buckets == neuron.cache_buckets == (128, 256, 512, 1000)
