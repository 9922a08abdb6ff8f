"""Streamed safetensors files hold what safetensors writes, with the hash of hashlib; matrices begin at pages."""

import hashlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import KINDS, tiny_config
from transformers import OPTConfig

from optimum_opt_trn.checkpoint.layout import TensorSpec, checkpoint_files, layer_specs
from optimum_opt_trn.checkpoint.stream import write_tensors
from optimum_opt_trn.dtypes import AMP_DTYPES, DTYPES, to_torch


def random_tensors(specs):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(spec.shape, generator=generator).to(to_torch(spec.dtype)) for name, spec in specs.items()
    }


def addresses(content):
    """By the header of a safetensors file: for each tensor, its address in the file and its bytes."""
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    spans = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: (8 + length + start, content[8 + length :][start:end]) for name, (start, end) in spans.items()}


@pytest.mark.parametrize("amp", AMP_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_safetensors_writes(kind, amp, tmp_path):
    for specs in checkpoint_files(tiny_config(**KINDS[kind]), amp).values():
        tensors = random_tensors(specs)
        seen: list[int] = []
        file = tmp_path / "ours.safetensors"
        size, digest = write_tensors(file, specs, lambda name, t=tensors: iter(t[name].split(3)), seen.append)
        save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        content = file.read_bytes()
        ours, theirs = addresses(content), addresses((tmp_path / "theirs.safetensors").read_bytes())
        assert {name: held for name, (_, held) in ours.items()} == {name: held for name, (_, held) in theirs.items()}
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
        assert (
            sum(seen)
            == sum(spec.bytes for spec in specs.values())
            == sum(tensor.nbytes for tensor in tensors.values())
        )


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize("hidden", [768, 1024, 2560])
def test_matrices_begin_where_a_page_does(hidden, weight_dtype, tmp_path):
    config = OPTConfig(hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=1)
    specs = layer_specs(config, "f16", weight_dtype)
    file = tmp_path / "file.safetensors"
    tensors = random_tensors(specs)
    write_tensors(file, specs, lambda name: iter([tensors[name]]), lambda _: None)
    with safe_open(file, framework="pt") as opened:
        matrices = [name for name, spec in specs.items() if len(spec.shape) == 2 and spec.shape[1] > 1]
        assert len(matrices) == 6
        assert all(opened.get_tensor(name).data_ptr() % 4096 == 0 for name in matrices)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=5, max_size=5),
    rows=st.integers(1, 4),
)
def test_any_shapes_and_pieces(shapes, dtypes, rows, tmp_path):
    specs = {f"t{i}": TensorSpec(tuple(shape), dtypes[i]) for i, shape in enumerate(shapes)}
    tensors = random_tensors(specs)
    file = tmp_path / "file.safetensors"
    write_tensors(file, specs, lambda name: iter(tensors[name].split(rows)), lambda _: None)
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
