"""Complete plans."""

import json

import pytest
from small_models import KINDS, tiny_config
from test_memory import INF2, OPT_13B, OPT_66B
from transformers import OPTConfig

from optimum_opt_trn.checkpoint.quantization import quantization_config
from optimum_opt_trn.checkpoint.source import CHUNK_BYTES
from optimum_opt_trn.hardware import GiB
from optimum_opt_trn.planning.memory import checkpoint_bytes, plan_memory
from optimum_opt_trn.planning.plan import choose_plan, plan_everywhere, read_shape
from optimum_opt_trn.planning.setup import OPTShape, Setup


def test_a_shape_has_the_defaults_of_transformers():
    config, shape = OPTConfig(), OPTShape()
    assert {name: getattr(config, name, None) for name in vars(shape)} == vars(shape)
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_plans_as_the_configuration_does(kind, tmp_path):
    config = tiny_config(**KINDS[kind])
    assert_same_plans(config, Setup(2, 64, 2), tmp_path)


@pytest.mark.parametrize("head", [False, True])
def test_the_plan_of_an_int8_checkpoint_knows_its_head(head, tmp_path):
    config = tiny_config(tie_word_embeddings=not head, quantization_config=quantization_config(head))
    assert_same_plans(config, Setup(2, 64, 2, weight_dtype="int8"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": "gptq"}))
    with pytest.raises(ValueError, match="not a model's configuration"):
        read_shape(str(tmp_path))


def assert_same_plans(config, setup, directory):
    config.save_pretrained(directory)
    expected = (plan_memory(config, setup, INF2), checkpoint_bytes(config, setup))
    for model in (directory, directory / "config.json"):
        shape = read_shape(str(model))
        assert (plan_memory(shape, setup, INF2), checkpoint_bytes(shape, setup)) == expected


def test_a_model_of_the_hub_is_found_in_the_cache(tmp_path):
    commit = "0" * 40
    folder = tmp_path / "models--facebook--opt-tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    tiny_config().save_pretrained(folder / "snapshots" / commit)
    assert read_shape("facebook/opt-tiny", cache_dir=str(tmp_path)).hidden_size == 64


def test_what_is_no_opt_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama'"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a model's configuration"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        read_shape(str(tmp_path))


def test_left_to_choose_it_takes_the_fewest_chips_and_cores():
    def chosen(config, batch, instance=None, degree=None):
        memory = choose_plan(config, Setup(batch, 2048), instance, degree).memory
        return memory.instance.name, memory.setup.tp_degree, memory.fits

    assert chosen(OPT_13B, 2) == ("inf2.xlarge", 2, True)
    assert chosen(OPT_13B, 3) == ("inf2.24xlarge", 4, True)
    assert chosen(OPT_13B, 3, "trn1.32xlarge") == ("trn1.32xlarge", 8, True)
    assert chosen(OPT_13B, 3, "trn1.2xlarge") == ("trn1.2xlarge", 2, False)
    assert chosen(OPT_13B, 3, degree=8) == ("inf2.24xlarge", 8, True)
    assert chosen(OPT_66B, 1000) == ("inf2.48xlarge", 24, False)


def test_what_cannot_be_split_so_is_refused_with_what_can():
    with pytest.raises(ValueError, match="tensor_parallel_size=3: trn1.2xlarge runs this model.* at 1, 2"):
        choose_plan(OPT_13B, Setup(), "trn1.2xlarge", 3)
    with pytest.raises(ValueError, match="exceeds the 2048 positions"):
        choose_plan(OPT_13B, Setup(sequence_length=4096), None, None)


def test_every_instance_is_compared():
    plans = {plan.memory.instance.name: plan for plan in plan_everywhere(OPT_13B, Setup(3, 2048))}
    assert not plans["trn1.2xlarge"].memory.fits
    assert plans["inf2.48xlarge"].memory.fits
    assert plans["inf2.48xlarge"].memory.setup.tp_degree == 4


def test_json_has_what_callers_read_and_adds_up():
    values = json.loads(json.dumps(choose_plan(OPT_13B, Setup(3, 2048), "trn1.2xlarge", 2).to_dict()))
    parts = ("weights", "cache", "workspace", "reserve", "free")
    assert values["hbm_bytes_per_core"] == sum(values[f"{part}_bytes_per_core"] for part in parts)
    assert values["fits"] is False
    assert values["free_bytes_per_core"] < 0
    assert (values["max_batch_size"], values["max_sequence_length"]) == (2, 1963)
    assert values["decode_tokens_per_second_realistic"] < values["decode_tokens_per_second"]
    assert sum(values["weights_by_part"].values()) == values["weights_bytes_per_core"]


def test_the_host_splits_a_model_of_any_size_in_as_much_memory():
    plans = [
        choose_plan(config, Setup(), name, None) for config in (OPT_13B, OPT_66B) for name in ("inf2.48xlarge", "cpu")
    ]
    assert {plan.host["split"] for plan in plans} == {GiB // 2}
    assert plans[0].host["split"] > 9 * CHUNK_BYTES  # chunks that wait to be hashed and written, and one that is cast
    for plan in plans:
        total, largest = checkpoint_bytes(plan.config, plan.memory.setup)
        assert plan.host["disk"] == total
        memory = plan.memory
        everything_else = memory.cache + memory.workspace + memory.reserve
        assert plan.host["load"] == (largest if memory.instance.on_neuron else everything_else)
        # The copy that the tracer makes of one rank's weights and caches.
        on_core = sum(memory.weights.values()) + memory.cache
        assert plan.host["trace"] == (on_core if memory.instance.on_neuron else 0)
    values = plans[0].to_dict()
    told = [values[f"host_bytes_to_{what}"] for what in ("split", "trace", "load")]
    assert told == [GiB // 2, plans[0].host["trace"], plans[0].host["load"]]
