"""The table of dtypes, against torch and safetensors."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from optimum_opt_trn.dtypes import AMP_DTYPES, DTYPES, normalize_dtype, to_torch


@pytest.mark.parametrize("name", DTYPES)
def test_bytes_and_names_are_those_of_torch_and_safetensors(name):
    tensor = torch.zeros(3).to(to_torch(name))
    assert DTYPES[name].bytes == tensor.element_size()
    assert str(tensor.dtype) == f"torch.{DTYPES[name].torch}"
    assert f'"dtype":"{DTYPES[name].safetensors}"'.encode() in save({"x": tensor})


@pytest.mark.parametrize("name", AMP_DTYPES)
def test_every_name_of_a_dtype_is_understood(name):
    dtype = DTYPES[name]
    for value in (name, dtype.torch, dtype.cli, f"torch.{dtype.torch}", to_torch(name), *dtype.aliases):
        assert normalize_dtype(value) == name


@pytest.mark.parametrize("value", ["int8", "f8", "F16", "", None, 16, torch.int8, torch.float64])
def test_other_dtypes_are_refused(value):
    with pytest.raises(ValueError, match="kv_cache_dtype=.*choose f16, bf16 or f32") as error:
        normalize_dtype(value, "kv_cache_dtype")
    assert repr(value) in str(error.value)


def test_the_tables_import_no_torch():
    modules = ("dtypes", "hardware", "buckets", "model.shapes", "checkpoint.layout", "planning.plan")
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("optimum_opt_trn." + name)
print(*sorted({{"torch", "transformers"}} & sys.modules.keys()))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
