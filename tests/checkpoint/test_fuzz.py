"""Damaged checkpoints in every format give an error or a complete split checkpoint, never a wrong one.

For longer than a test run: FUZZ_EXAMPLES=20000 pytest tests/checkpoint/test_fuzz.py
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from damage import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import save_as_pytorch, tiny_config, tiny_opt

from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.checkpoint import load_weights
from optimum_opt_trn.checkpoint.hub import open_checkpoint
from optimum_opt_trn.checkpoint.layout import INDEX_NAME, checkpoint_files
from optimum_opt_trn.checkpoint.manifest import MANIFEST_NAME, UNFINISHED_NAME
from optimum_opt_trn.checkpoint.small_files import save_config
from optimum_opt_trn.checkpoint.verify import find_problems
from optimum_opt_trn.checkpoint.write import write_split
from optimum_opt_trn.model.parallel import RankGroup


CONFIG = tiny_config(
    vocab_size=8, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_attention_heads=2, num_hidden_layers=1,
    max_position_embeddings=16,
)  # fmt: skip
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 25))


def old_split(directory: Path, state: dict) -> None:
    (directory / "pytorch_model.bin").mkdir(parents=True)
    names = {name: f"p{index}.{name}" for index, name in enumerate(state)}
    for name, tensor in state.items():
        torch.save(tensor, directory / "pytorch_model.bin" / names[name])
    (directory / "pytorch_model.bin" / "key_to_filename.json").write_text(json.dumps(names))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The same small model in every format."""
    root = tmp_path_factory.mktemp("sources")
    options = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "word_embed_proj_dim", "ffn_dim")}
    options |= {"num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = tiny_opt(**options)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for form in ("safetensors", "sharded", "bin", "sharded bin", "old bin", "old split"):
        (root / form).mkdir()
    save_file(state, root / "safetensors" / "model.safetensors", metadata={"format": "pt"})
    model.save_pretrained(root / "sharded", max_shard_size="2KB")
    save_as_pytorch(model, root / "sharded bin", 2_000)
    torch.save(state, root / "bin" / "pytorch_model.bin")
    torch.save(state, root / "old bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    old_split(root / "old split", state)
    split(root / "safetensors", root / "split", "f32")
    return {path.name: path for path in root.iterdir()}


FORMS = ["safetensors", "sharded", "bin", "sharded bin", "old bin", "old split", "split"]
fuzzed = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@fuzzed
@given(data=st.data())
def test_damaged_sources(form, sources, tmp_path, data):
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    source = Path(shutil.copytree(sources[form], tmp_path / "source"))
    files = sorted(f for f in source.rglob("*") if f.is_file() and f.name not in ("config.json", MANIFEST_NAME))
    for _ in range(data.draw(st.integers(1, 2))):
        file = data.draw(st.sampled_from(files))
        file.write_bytes(data.draw(damage())(file.read_bytes()))
    assert_error_or_whole(source, tmp_path / "out")


def split(source: Path, output: Path, amp: str) -> None:
    weights = open_checkpoint(source, checkpoint_files(CONFIG, amp)).weights
    write_split(weights, output, amp, partial(save_config, CONFIG, amp))


def assert_error_or_whole(source: Path, output: Path) -> None:
    try:
        split(source, output, "f16")
    except (ValueError, OSError) as error:
        assert str(error)
        assert not (output / INDEX_NAME).exists()
    else:
        assert find_problems(output) == []


@fuzzed
@given(data=st.data())
def test_damaged_outputs(sources, tmp_path, data):
    """A damaged split checkpoint: loading gives an error or the right shapes, and splitting again repairs it."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    output = Path(shutil.copytree(sources["split"], tmp_path / "out"))
    if data.draw(st.booleans()):
        (output / MANIFEST_NAME).rename(output / UNFINISHED_NAME)
    for _ in range(data.draw(st.integers(1, 2))):
        file = data.draw(st.sampled_from(sorted(output.iterdir())))
        file.write_bytes(data.draw(damage())(file.read_bytes()))
    try:
        weights = load_weights(output, CONFIG, OPTNeuronConfig(sequence_length=16, amp="f32"), RankGroup())
        assert weights.layers[0]["fc1.weight"][0].shape == (8, 8)
    except ValueError as error:
        assert str(output) in str(error)
    find_problems(output)
    split(sources["safetensors"], output, "f32")
    assert find_problems(output) == []
    for file in sources["split"].glob("*.safetensors"):
        assert (output / file.name).read_bytes() == file.read_bytes()
