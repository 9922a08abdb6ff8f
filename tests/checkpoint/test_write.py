"""Writing the split checkpoint: what is in it, from every source, and what a failure leaves."""

import json
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_models import KINDS, SHIPPED_MODEL, rounded, save_as_pytorch, tiny_config, tiny_opt
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTForCausalLM,
)

from optimum_opt_trn import CheckpointError, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import load_weights
from optimum_opt_trn.checkpoint.formats import Piece
from optimum_opt_trn.checkpoint.layout import INDEX_NAME, OUTER_FILE, checkpoint_files
from optimum_opt_trn.checkpoint.manifest import MANIFEST_NAME
from optimum_opt_trn.checkpoint.source import WeightSource, open_model
from optimum_opt_trn.checkpoint.write import write_split
from optimum_opt_trn.model.parallel import RankGroup


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
PROMPT = torch.tensor([[2, 17, 99, 4, 56, 23, 8]])


def split_tensors(directory) -> dict[str, Tensor]:
    """All tensors of the files that the index names, read without our code."""
    index = json.loads((directory / INDEX_NAME).read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(directory / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file
                tensors[name] = opened.get_tensor(name)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def rounded_by_numpy(tensor: Tensor, amp: str) -> np.ndarray:
    """float32 bits of float32 values rounded to nearest, ties to even."""
    values = tensor.detach().numpy()
    if amp == "f16":
        values = values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    if amp == "bf16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits


def assert_is_split_of(directory, model: OPTForCausalLM, amp: str) -> None:
    state = model.float().state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = split_tensors(directory)
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        kept = "layer_norm" in name or "embed_positions" in name
        assert tensor.dtype == (torch.float32 if kept else DTYPES[amp]), name
        expected = rounded_by_numpy(state[name], "f32" if kept else amp)
        assert np.array_equal(tensor.float().numpy().view(np.uint32), expected), name


@pytest.mark.parametrize("amp", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model(kind, amp, tmp_path):
    model = tiny_opt(**KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config_before = model.config.to_dict()
    directory = save_pretrained_split(model, tmp_path / "new" / "split", amp)
    assert directory == tmp_path / "new" / "split"
    assert_is_split_of(directory, model, amp)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.to_dict() == config_before


@pytest.mark.parametrize(
    "save",
    [
        lambda model, path: model.save_pretrained(path),
        lambda model, path: model.save_pretrained(path, max_shard_size="60KB"),
        lambda model, path: save_as_pytorch(model, path),
        lambda model, path: save_as_pytorch(model, path, 60_000),
    ],
    ids=["safetensors", "sharded safetensors", "pytorch", "sharded pytorch"],
)
def test_directory_in_every_form(save, tmp_path):
    model = tiny_opt(**KINDS["post_norm"])
    save(model, tmp_path / "source")
    assert_is_split_of(save_pretrained_split(str(tmp_path / "source"), tmp_path / "split"), model, "f16")


def test_source_of_16_bits(tmp_path):
    model = tiny_opt().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    assert_is_split_of(save_pretrained_split(tmp_path / "source", tmp_path / "bf16", "bf16"), model, "bf16")
    assert_is_split_of(save_pretrained_split(model, tmp_path / "f16", torch.float16), model, "f16")


def test_a_split_checkpoint_is_a_source(tmp_path):
    model = tiny_opt()
    first = save_pretrained_split(model, tmp_path / "first", "f32")
    assert_is_split_of(save_pretrained_split(first, tmp_path / "second", "f16"), model, "f16")


def test_files(tmp_path):
    save_pretrained_split(tiny_opt(num_hidden_layers=3), tmp_path)
    layers = [f"layer_{i:03d}.safetensors" for i in range(3)]
    configs = {"config.json", "generation_config.json", MANIFEST_NAME}
    assert {path.name for path in tmp_path.iterdir()} == {*configs, INDEX_NAME, OUTER_FILE, *layers}
    for i, file in enumerate(layers):
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert {name.split(".")[3] for name in opened.keys()} == {str(i)}  # noqa: SIM118


@pytest.mark.parametrize("amp", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it(kind, amp, tmp_path):
    model = tiny_opt(**KINDS[kind])
    save_pretrained_split(model, tmp_path, amp)
    loaded, report = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(loaded(PROMPT).logits, rounded(model, DTYPES[amp])(PROMPT).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == DTYPES[amp]


def test_configuration_is_the_sources(tmp_path):
    model = tiny_opt(**KINDS["galactica"])
    model.config.bos_token_id = 7
    save_pretrained_split(model, tmp_path, "bf16")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["OPTForCausalLM"]
    assert written["dtype"] == "bfloat16"
    assert (written["bos_token_id"], written["enable_bias"], written["activation_function"]) == (7, False, "gelu")


def test_splitting_again_replaces(tmp_path):
    save_pretrained_split(tiny_opt(seed=1), tmp_path, "bf16")
    model = tiny_opt(seed=2)
    save_pretrained_split(model, tmp_path, "f16")
    assert_is_split_of(tmp_path, model, "f16")


def test_other_weights_in_the_directory_are_refused(tmp_path):
    save_pretrained_split(tiny_opt(num_hidden_layers=3), tmp_path)
    before = split_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="already holds layer_002.safetensors"):
        save_pretrained_split(tiny_opt(), tmp_path)
    after = split_tensors(tmp_path)  # complete and unchanged
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("again", [False, True])
def test_an_interruption_leaves_no_checkpoint(error, again, tmp_path):
    model = tiny_opt()
    if again:
        save_pretrained_split(model, tmp_path)

    def interrupted() -> Tensor:
        raise error("now")

    readers = {name: tensor.detach for name, tensor in model.state_dict().items()}
    readers["model.decoder.layers.1.fc1.weight"] = interrupted
    with pytest.raises(error):
        write_split(source_of(readers, model.config, "f16"), tmp_path, "f16", model.config.save_pretrained)
    assert not (tmp_path / INDEX_NAME).exists()
    with pytest.raises(OSError):
        OPTForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        load_weights(tmp_path, model.config, OPTNeuronConfig(sequence_length=64), RankGroup())
    save_pretrained_split(model, tmp_path)  # and does not disturb the next run
    assert_is_split_of(tmp_path, model, "f16")
    assert not list(tmp_path.glob("*.partial"))


def source_of(readers, config, amp) -> WeightSource:
    """A source that opens nothing before it is read."""
    pieces = [Piece(lambda: readers, lambda names: "the test", names=list(readers))]
    return WeightSource(pieces, "the test", checkpoint_files(config, amp))


@pytest.mark.parametrize("amp", ["f16", "f32"])
def test_one_files_tensors_are_in_memory_at_a_time(amp, tmp_path):
    config = tiny_config(num_hidden_layers=4)
    model = tiny_opt(num_hidden_layers=4)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(tensor: Tensor) -> Tensor:
        nonlocal most
        copy = tensor.clone()
        alive.add(copy)
        most = max(most, sum(t.nbytes for t in alive))
        return copy

    # A source of float32 that needs no cast: what is written is what was read.
    readers = {name: lambda t=tensor: read(t.to(DTYPES[amp])) for name, tensor in model.state_dict().items()}
    write_split(source_of(readers, config, amp), tmp_path, amp, config.save_pretrained)
    largest = max(
        sum(torch.Size(spec.shape).numel() * DTYPES[amp].itemsize for spec in specs.values())
        for specs in checkpoint_files(config, amp).values()
    )
    assert most <= largest
    assert not alive


@pytest.mark.parametrize("amp", ["int8", "f64", None, torch.int8])
def test_wrong_dtype(amp, tmp_path):
    with pytest.raises(ValueError, match="choose f16, bf16 or f32"):
        save_pretrained_split(tiny_opt(), tmp_path / "out", amp)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_no_opt(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    for source in (gpt2, tmp_path / "gpt2"):
        with pytest.raises(ValueError, match="model_type 'gpt2'"):
            save_pretrained_split(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match="no/such-model"):
        save_pretrained_split("no/such-model", tmp_path / "out", local_files_only=True)
    with pytest.raises(OSError, match="nowhere"):
        save_pretrained_split(tmp_path / "deep" / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directory_without_a_configuration(tmp_path):
    """transformers would guess the model type from the directory's name."""
    tiny_opt().save_pretrained(tmp_path / "my-opt")
    (tmp_path / "my-opt" / "config.json").unlink()
    with pytest.raises(OSError, match="my-opt has no config.json"):
        save_pretrained_split(tmp_path / "my-opt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_their_configuration(tmp_path):
    tiny_opt().save_pretrained(tmp_path / "source")
    tiny_config(num_hidden_layers=3).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="lacks 16 tensors"):
        save_pretrained_split(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny_config(ffn_dim=100).save_pretrained(tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"fc1.weight has shape \(96, 64\), but config.json makes it \(100, 64\)"
    ):
        save_pretrained_split(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_values_beyond_float16(tmp_path):
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.bias[3] = 7e4
    with pytest.raises(CheckpointError, match="layers.1.fc2.bias has values that are not finite.*try bf16"):
        save_pretrained_split(model, tmp_path / "f16")
    assert not (tmp_path / "f16" / INDEX_NAME).exists()
    assert_is_split_of(save_pretrained_split(model, tmp_path / "bf16", "bf16"), model, "bf16")


def test_open_model_reads_the_present_values(tmp_path):
    """A source is a view of the model, so that nothing is copied before it is written."""
    model = tiny_opt()
    source = open_model(model, checkpoint_files(model.config, "f32"))
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias.fill_(0.25)
    write_split(source, tmp_path, "f32", model.config.save_pretrained)
    assert split_tensors(tmp_path)["model.decoder.layers.0.fc1.bias"].eq(0.25).all()


def test_tokenizer_and_generation_config_come_along(tmp_path):
    save_pretrained_split(SHIPPED_MODEL, tmp_path / "split")
    text = "It was a truth universally acknowledged."
    ids = [AutoTokenizer.from_pretrained(path)(text).input_ids for path in (SHIPPED_MODEL, tmp_path / "split")]
    assert ids[0] == ids[1]
    assert GenerationConfig.from_pretrained(tmp_path / "split").eos_token_id == 2


def test_an_old_checkpoints_version_tensor_is_ignored(tmp_path):
    model = tiny_opt()
    state = {**model.state_dict(), "model.decoder.version": torch.tensor([3.0])}
    (tmp_path / "old").mkdir()
    model.config.save_pretrained(tmp_path / "old")
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    save_pretrained_split(tmp_path / "old", tmp_path / "split", "f32")
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "split")
    assert all(torch.equal(ours, model.state_dict()[name]) for name, ours in loaded.state_dict().items())
