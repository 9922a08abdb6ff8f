"""Streamed safetensors files equal those that safetensors writes, with the hash of hashlib."""

import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import KINDS, tiny_config

from optimum_opt_trn.checkpoint.layout import TensorSpec, checkpoint_files
from optimum_opt_trn.checkpoint.stream import write_tensors
from optimum_opt_trn.dtypes import AMP_DTYPES, DTYPES, to_torch


def random_tensors(specs):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(spec.shape, generator=generator).to(to_torch(spec.dtype)) for name, spec in specs.items()
    }


@pytest.mark.parametrize("amp", AMP_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_safetensors(kind, amp, tmp_path):
    for specs in checkpoint_files(tiny_config(**KINDS[kind]), amp).values():
        tensors = random_tensors(specs)
        seen: list[int] = []
        file = tmp_path / "ours.safetensors"
        size, digest = write_tensors(file, specs, lambda name, t=tensors: iter(t[name].split(3)), seen.append)
        save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        content = file.read_bytes()
        assert content == (tmp_path / "theirs.safetensors").read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
        assert (
            sum(seen)
            == sum(spec.bytes for spec in specs.values())
            == sum(tensor.nbytes for tensor in tensors.values())
        )


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
