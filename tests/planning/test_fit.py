"""Exports that cannot fit, and options that do not suit the model, are refused."""

import logging

import pytest
from small_models import tiny_config, tiny_opt
from test_memory import OPT_13B, OPT_30B

import optimum_opt_trn.planning.host
from optimum_opt_trn import DoesNotFitError, NeuronOPTForCausalLM, OPTNeuronConfig
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.planning.host import this_host
from optimum_opt_trn.planning.memory import check_fit, check_model, plan_memory
from optimum_opt_trn.planning.setup import Setup


@pytest.fixture
def available(monkeypatch):
    """Sets how many bytes this host has."""

    def make(size: int) -> None:
        monkeypatch.setattr(optimum_opt_trn.planning.host, "host_memory", lambda: (2**40, size))

    return make


def test_on_trn1_it_is_refused_with_the_sums_and_what_would_fit():
    fitting = {"sequence_length": 2048, "tp_degree": 2, "instance_type": "trn1"}
    check_fit(OPT_13B, OPTNeuronConfig(batch_size=2, **fitting))
    too_large = OPTNeuronConfig(batch_size=3, **fitting)
    with pytest.raises(DoesNotFitError) as raised:
        check_fit(OPT_13B, too_large)
    message = str(raised.value)
    for part in (
        "batch_size=3",
        "weights 12.00 GiB",
        "cache 2.34 GiB",
        "workspace 512.00 MiB",
        "reserve 1.25 GiB",
        "16.00 GiB",
    ):
        assert part in message
    assert "Choose batch_size=2, or sequence_length=1963, or tp_degree=8, or force=True" in message
    check_fit(OPT_13B, too_large, force=True)


def test_what_is_suggested_fits():
    for changes in ({"batch_size": 2}, {"sequence_length": 1963}, {"tp_degree": 8}):
        options = {"batch_size": 3, "sequence_length": 2048, "tp_degree": 2, "instance_type": "trn1", **changes}
        check_fit(OPT_13B, OPTNeuronConfig(**options))


def test_where_no_degree_helps_another_instance_is_named():
    # 56 heads: 8 is the largest degree of trn1 that divides them.
    neuron_config = OPTNeuronConfig(batch_size=24, sequence_length=2048, tp_degree=8, instance_type="trn1")
    with pytest.raises(DoesNotFitError, match=r"or trn2\.48xlarge with tp_degree=8, or force=True"):
        check_fit(OPT_30B, neuron_config)


def test_on_cpu_cache_and_workspace_have_to_fit_and_weights_are_warned_of(available, caplog):
    config, neuron_config = tiny_config(), OPTNeuronConfig(batch_size=4, sequence_length=128, kv_cache_dtype="f32")
    plan = plan_memory(config, Setup.of(neuron_config), this_host())
    logging.getLogger("transformers").propagate = True
    available(plan.total)
    check_fit(config, neuron_config)
    assert not caplog.records
    available(plan.total - 1)
    check_fit(config, neuron_config)
    assert "read from the disk again" in caplog.text
    available(plan.cache + plan.workspace + plan.reserve)
    check_fit(config, neuron_config)
    available(plan.cache + plan.workspace + plan.reserve - 1)
    with pytest.raises(DoesNotFitError, match="available on this host. Choose"):
        check_fit(config, neuron_config)


def test_a_system_that_does_not_tell_its_memory_is_not_asked(monkeypatch):
    def no_proc():
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(optimum_opt_trn.planning.host, "host_memory", no_proc)
    check_fit(tiny_config(), OPTNeuronConfig(batch_size=2**20))


def test_an_export_is_refused_before_anything_is_written(save_opt, tmp_path, available):
    source, output = save_opt(), tmp_path / "out"
    available(1000)
    with pytest.raises(DoesNotFitError):
        export_opt(source, output, OPTNeuronConfig(sequence_length=64), eager=True)
    assert not output.exists()
    export_opt(source, output, OPTNeuronConfig(sequence_length=64), eager=True, force=True)
    assert output.exists()


def test_a_load_is_refused_unless_forced(save_opt, tmp_path, available):
    output = export_opt(save_opt(tiny_opt()), tmp_path / "out", OPTNeuronConfig(sequence_length=64), eager=True)
    available(1000)
    with pytest.raises(DoesNotFitError, match="force=True"):
        NeuronOPTForCausalLM.from_pretrained(output, eager=True)
    assert NeuronOPTForCausalLM.from_pretrained(output, eager=True, force=True).runtime


def test_a_model_that_suits_the_options_passes():
    model = tiny_config(max_position_embeddings=100)
    for degree in (1, 2, 4):
        check_model(model, OPTNeuronConfig(sequence_length=100, tp_degree=degree))


def test_a_sequence_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="sequence_length=101 exceeds the 100 positions.*choose at most 100"):
        check_model(tiny_config(max_position_embeddings=100), OPTNeuronConfig(sequence_length=101))


@pytest.mark.parametrize(
    ("heads", "ffn_dim", "degree", "possible"),
    [
        (12, 48, 5, "1, 2, 3, 4, 6, 12"),
        (12, 48, 24, "1, 2, 3, 4, 6, 12"),  # more ranks than heads
        (12, 20, 3, "1, 2, 4"),  # the heads can be split, the MLP cannot
        (7, 28, 2, "1, 7"),
    ],
)
def test_a_degree_that_does_not_split_the_model_is_refused(heads, ffn_dim, degree, possible):
    model = tiny_config(hidden_size=heads * 4, num_attention_heads=heads, ffn_dim=ffn_dim)
    message = f"tp_degree={degree} cannot split {heads} attention heads and an MLP of {ffn_dim}.*one of {possible}\\."
    with pytest.raises(ValueError, match=message):
        check_model(model, OPTNeuronConfig(sequence_length=64, tp_degree=degree))
