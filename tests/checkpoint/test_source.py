"""Reading weights: names and shapes are checked, values are cast, pieces are opened and closed."""

import pytest
import torch
from safetensors.torch import save_file
from small_models import KINDS, save_as_pytorch, tiny_config, tiny_opt
from test_formats import FC1, assert_same_tensors, open_directory
from transformers import OPTModel

from optimum_opt_trn import CheckpointError
from optimum_opt_trn.checkpoint import source as source_module
from optimum_opt_trn.checkpoint.formats import LocalFiles
from optimum_opt_trn.checkpoint.hub import open_files
from optimum_opt_trn.checkpoint.layout import checkpoint_files
from optimum_opt_trn.checkpoint.source import WeightSource, open_model
from optimum_opt_trn.checkpoint.write import write_split
from optimum_opt_trn.dtypes import to_torch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_loaded_model(kind, dtype):
    model = tiny_opt(**KINDS[kind]).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same_tensors(open_model(model, checkpoint_files(model.config, "f32")), model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == dtype for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("amp", ["f32", "f16"])
def test_a_chunk_is_small_before_and_after_the_cast(dtype, amp, monkeypatch):
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 1024)
    model = tiny_opt().to(dtype)
    chunks = [*open_model(model, checkpoint_files(model.config, amp)).chunks(FC1)]
    # 96 rows of 64: four of them are 1024 bytes of float32, eight in 16 bits.
    assert [len(chunk) for chunk in chunks] == ([4] * 24 if dtype == torch.float32 or amp == "f32" else [8] * 12)
    assert torch.equal(torch.cat(chunks), model.state_dict()[FC1].to(to_torch(amp)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_names_without_the_prefix(suffix, tmp_path):
    """Checkpoints of OPTModel, such as the first ones on the hub."""
    model = tiny_opt()
    (OPTModel.save_pretrained if suffix == "safetensors" else save_as_pytorch)(model.model, tmp_path)
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def test_tied_head_that_was_written_out(tmp_path):
    model = tiny_opt()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    assert_same_tensors(open_directory(tmp_path, model.config), model)


def saved(tmp_path, change, amp="f32", **overrides) -> WeightSource:
    """The source of a tiny model's weights after `change(state)`, for `amp` and the configuration with `overrides`."""
    state = {name: tensor.clone() for name, tensor in tiny_opt().state_dict().items() if name != "lm_head.weight"}
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    return open_directory(tmp_path, tiny_config(**overrides), amp)


def test_missing_and_extra_tensors(tmp_path):
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors: {FC1}"):
        saved(tmp_path, lambda state: state.pop(FC1))
    with pytest.raises(CheckpointError, match="holds, beyond what config.json says, 1 tensors: extra"):
        saved(tmp_path, lambda state: state.update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="lacks 16 tensors.*, …"):  # one layer more than the file has
        saved(tmp_path, lambda state: None, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="holds, beyond.*16 tensors"):
        saved(tmp_path, lambda state: None, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="lacks 1 tensors: lm_head.weight"):
        saved(tmp_path, lambda state: None, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("value", "amp", "message"),
    [
        (torch.zeros(96, 63), "f32", r"shape \(96, 63\), but config.json makes it \(96, 64\)"),
        (torch.zeros(64, 96), "f32", r"shape \(64, 96\)"),
        (torch.zeros(96 * 64), "f32", r"shape \(6144,\)"),
        (torch.zeros(96, 64, dtype=torch.int8), "f32", "dtype torch.int8, not a floating-point dtype"),
        (torch.full((96, 64), torch.nan), "f32", "values that are not finite in the source"),
        (torch.full((96, 64), -torch.inf), "f16", "values that are not finite in the source"),
        (torch.full((96, 64), 1e5), "f16", "values that are not finite once cast to torch.float16: try bf16"),
    ],
)
def test_bad_tensors(value, amp, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"{FC1} has {message}") as error:
        saved(tmp_path, lambda state: state.update({FC1: value}), amp).read(FC1)
    assert str(tmp_path) in str(error.value)


def test_large_values_fit_bf16(tmp_path):
    tensor = saved(tmp_path, lambda state: state.update({FC1: torch.full((96, 64), 1e5)}), "bf16").read(FC1)
    torch.testing.assert_close(tensor.float(), torch.full((96, 64), 1e5), rtol=2**-8, atol=0)


def test_pieces_are_opened_once_and_closed_when_they_are_done(tmp_path):
    """So that a file that was fetched for its tensors can be deleted as soon as they are written."""
    model = tiny_opt(num_hidden_layers=4)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    events: list[str] = []

    class Files(LocalFiles):
        def __init__(self, directory):
            super().__init__(directory)
            self.directory = None  # as if they were fetched

        def find(self, name):
            if name.startswith("model-"):
                events.append(f"open {name}")
            return super().find(name)

        def discard(self, name):
            events.append(f"close {name}")

    shards = sorted(file.name for file in tmp_path.glob("model-*"))
    assert len(shards) > 4
    weights = open_files(Files(tmp_path), checkpoint_files(model.config, "f16"))
    write_split(weights, tmp_path / "out", "f16", model.config.save_pretrained)
    assert sorted(events) == sorted([f"{what} {name}" for name in shards for what in ("open", "close")])
    held, most = 0, 0
    for event in events:
        held += 1 if event.startswith("open") else -1
        most = max(most, held)
    assert most < len(shards)
