"""Export: the content of a directory, what is refused, and what an interruption leaves."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from small_models import KINDS, SHIPPED_MODEL, rounded, tiny_opt
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, OPTConfig, OPTForCausalLM

from optimum_opt_trn import CheckpointError, NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint import verify_checkpoint
from optimum_opt_trn.checkpoint.layout import INDEX_NAME
from optimum_opt_trn.checkpoint.lock import one_writer
from optimum_opt_trn.checkpoint.manifest import MANIFEST_NAME
from optimum_opt_trn.checkpoint.source import WeightSource
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.host_framework import INSTALLED
from optimum_opt_trn.targets.cpu import CPUTarget


ROOT = Path(__file__).parents[1]
PROMPT = torch.tensor([[2, 17, 99, 4, 56, 23, 8]])


def neuron_config(**options) -> OPTNeuronConfig:
    return OPTNeuronConfig(**{"sequence_length": 64, **options})


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: names, and contents of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def source(save_opt) -> Path:
    return save_opt()


@pytest.fixture
def with_tokenizer(source) -> Path:
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(source)
    return source


def test_directory(with_tokenizer, tmp_path):
    config = neuron_config(tp_degree=2, amp="bf16")
    output = export_opt(with_tokenizer, str(tmp_path / "a" / "b" / "out"), config, eager=True)
    assert output == tmp_path / "a" / "b" / "out"
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    tokenizer = {path.name for path in with_tokenizer.iterdir()} & {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    }
    assert len(tokenizer) >= 2
    configs = {"config.json", "generation_config.json", "neuron_config.json", "export_manifest.json"}
    own = {*configs, "checkpoint", "compiled"}
    assert {path.name for path in output.iterdir()} == own | tokenizer
    assert {path.name for path in (output / "checkpoint").iterdir()} == {
        *("config.json", INDEX_NAME, MANIFEST_NAME, "embeddings_and_head.safetensors"),
        *("layer_000.safetensors", "layer_001.safetensors"),
    }
    assert [path.name for path in (output / "compiled").iterdir()] == ["manifest.json"]
    assert OPTNeuronConfig.from_pretrained(output) == config
    written = json.loads((output / "config.json").read_text())
    assert (written["architectures"], written["dtype"]) == (["OPTForCausalLM"], "bfloat16")
    text = "It is a truth universally acknowledged"
    ids = AutoTokenizer.from_pretrained(with_tokenizer)(text).input_ids
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == ids


@pytest.mark.parametrize("kind", KINDS)
def test_its_checkpoint_gives_the_same_logits_in_transformers(kind, save_opt, tmp_path):
    model = tiny_opt(**KINDS[kind])
    output = export_opt(save_opt(model), tmp_path / "out", neuron_config(kv_cache_dtype="f32"), eager=True)
    loaded = OPTForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        expected = loaded(PROMPT).logits
        torch.testing.assert_close(expected, rounded(model)(PROMPT).logits)
    ours = NeuronOPTForCausalLM.from_pretrained(output, eager=True)(PROMPT).logits
    assert (ours - expected).abs().max() <= 1e-3 * expected.std()


def test_source_is_not_changed(with_tokenizer, tmp_path):
    before = snapshot(with_tokenizer)
    export_opt(with_tokenizer, tmp_path / "out", neuron_config(), eager=True)
    assert snapshot(with_tokenizer) == before


def test_generation_config_is_the_sources(source, tmp_path):
    GenerationConfig(eos_token_id=[5, 6], pad_token_id=1, max_length=33).save_pretrained(source)
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    written = GenerationConfig.from_pretrained(output)
    assert (written.eos_token_id, written.pad_token_id, written.max_length) == ([5, 6], 1, 33)


def test_generation_config_without_one(source, tmp_path):
    (source / "generation_config.json").unlink()
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    assert GenerationConfig.from_pretrained(output).eos_token_id == 2  # of config.json


def test_source_without_tokenizer_warns(source, tmp_path, caplog):
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    warnings = [record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage()]
    assert len(warnings) == 1 and str(source) in warnings[0]
    assert not list(output.glob("*token*")) and not list(output.glob("vocab*"))
    assert NeuronOPTForCausalLM.from_pretrained(output, eager=True).preprocessors == []


def test_source_with_tokenizer_does_not_warn(with_tokenizer, tmp_path, caplog):
    export_opt(with_tokenizer, tmp_path / "out", neuron_config(), eager=True)
    assert not [record for record in caplog.records if "tokenizer" in record.getMessage()]


def test_permissions_are_as_for_any_new_directory(source, tmp_path):
    (tmp_path / "plain").mkdir()
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_export_is_a_source_by_its_checkpoint(source, tmp_path):
    first = export_opt(source, tmp_path / "first", neuron_config(), eager=True)
    second = export_opt(first / "checkpoint", tmp_path / "second", neuron_config(tp_degree=2), eager=True)
    files = [path.name for path in (first / "checkpoint").glob("*.safetensors")]
    assert all((first / "checkpoint" / f).read_bytes() == (second / "checkpoint" / f).read_bytes() for f in files)


def test_an_earlier_export_is_replaced(save_opt, tmp_path):
    old = save_opt(tiny_opt(seed=1, num_hidden_layers=3), "old")
    output = export_opt(old, tmp_path / "out", neuron_config(), eager=True)
    (output / "note.txt").write_text("of the old one")
    fresh = export_opt(save_opt(tiny_opt(seed=2), "new"), tmp_path / "fresh", neuron_config(tp_degree=2), eager=True)
    export_opt(tmp_path / "new", output, neuron_config(tp_degree=2), eager=True)
    assert snapshot(output) == snapshot(fresh)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "fresh", "out"}


def test_an_empty_directory_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    assert (tmp_path / "out" / "neuron_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_an_output_that_is_no_export_is_refused(source, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="taken exists and is not an export: choose another"):
        export_opt(source, taken, neuron_config(), eager=True)
    with pytest.raises(FileExistsError, match="thesis.tex exists and is not an export"):
        export_opt(source, taken / "thesis.tex", neuron_config(), eager=True)
    assert snapshot(tmp_path) == before


def test_output_that_is_the_source_is_refused(source, tmp_path, monkeypatch):
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    for output in (source, "source", tmp_path / "source" / ".." / "source"):
        with pytest.raises(FileExistsError, match="is the source itself"):
            export_opt(source, output, neuron_config(), eager=True)
    assert snapshot(tmp_path) == before


def fail_reading(monkeypatch, error) -> None:
    chunks, count = WeightSource.chunks, iter(range(1000))

    def failing(self, *args):
        if next(count) == 20:  # in the second layer
            raise error
        return chunks(self, *args)

    monkeypatch.setattr(WeightSource, "chunks", failing)


def fail_compiling(monkeypatch, error) -> None:
    def failing(self, config, neuron_config, directory, eager):
        assert (directory / "neuron_config.json").is_file()  # at this point everything else is there
        (directory / "compiled").mkdir()
        raise error

    monkeypatch.setattr(CPUTarget, "compile", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SystemExit(1)])
@pytest.mark.parametrize("fail", [fail_reading, fail_compiling])
def test_an_interrupted_export_leaves_what_was_there(fail, error, save_opt, tmp_path, monkeypatch):
    source = save_opt()
    earlier = export_opt(source, tmp_path / "earlier", neuron_config(), eager=True)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patched:
        fail(patched, error)
        with pytest.raises(type(error)):
            export_opt(source, tmp_path / "new", neuron_config(), eager=True)
    assert snapshot(tmp_path) == before
    with monkeypatch.context() as patched:
        fail(patched, error)
        with pytest.raises(type(error)):
            export_opt(source, earlier, neuron_config(batch_size=2), eager=True)
    assert snapshot(tmp_path) == before


def test_a_broken_source_leaves_nothing(source, tmp_path):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is broken"):
        export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    started = []
    monkeypatch.setattr(CPUTarget, "compile", lambda self, *_: started.append(True))
    monkeypatch.setattr("optimum_opt_trn.export.write_split", lambda *_: started.append(True))
    with pytest.raises(CheckpointError, match="lacks 16 tensors"):
        export_opt(source, tmp_path / "out", neuron_config())
    assert not started and [path.name for path in tmp_path.iterdir()] == ["source"]


def kill_half_way(code: str, source: Path, *outputs: Path) -> None:
    """Runs `code` in a process, and kills it when it has said for each output that it is half-way."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", code, source, *outputs],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    with child:
        try:
            assert child.stdout is not None
            assert [child.stdout.readline() for _ in outputs] == ["half-way\n"] * len(outputs)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL


def test_a_killed_export_leaves_what_was_there(source, tmp_path):
    """SIGKILL while the second layer is read: no clean-up runs at all."""
    earlier = export_opt(source, tmp_path / "earlier", neuron_config(), eager=True)
    before = snapshot(earlier)
    code = textwrap.dedent("""
        import os, sys, threading, time
        from optimum_opt_trn import OPTNeuronConfig
        from optimum_opt_trn.checkpoint.source import WeightSource
        from optimum_opt_trn.export import export_opt

        chunks = WeightSource.chunks
        def slow(self, name, *args):
            if name.startswith("model.decoder.layers.1."):
                os.write(1, b"half-way\\n")  # one call, since two threads write
                time.sleep(600)
            return chunks(self, name, *args)
        WeightSource.chunks = slow
        source, *outputs = sys.argv[1:]
        config = OPTNeuronConfig(sequence_length=64, batch_size=2)
        for output in outputs:
            threading.Thread(target=export_opt, args=(source, output, config), kwargs={"eager": True}).start()
        time.sleep(600)
    """)
    kill_half_way(code, source, earlier, tmp_path / "new")
    assert snapshot(earlier) == before
    # It was in the middle of both. What it left is hidden.
    hidden = {".earlier.partial", ".earlier.lock", ".new.partial", ".new.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "earlier", *hidden}
    # The next export of the same output continues from it.
    (tmp_path / ".new.partial" / "of another version").mkdir()
    done = tmp_path / ".new.partial" / "checkpoint" / "layer_000.safetensors"
    inode = done.stat().st_ino
    export_opt(source, tmp_path / "new", neuron_config(), eager=True)
    assert snapshot(tmp_path / "new") == before
    assert (tmp_path / "new" / "checkpoint" / "layer_000.safetensors").stat().st_ino == inode
    left = {".earlier.partial", ".earlier.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "earlier", "new", *left}


KILLED_WHILE_SWAPPING = """
import os, sys, shutil, time
from pathlib import Path
from optimum_opt_trn import OPTNeuronConfig
from optimum_opt_trn.export import export_opt

source, output = sys.argv[1:]
rename, rmtree, moment = os.rename, shutil.rmtree, "MOMENT"

def stop():
    os.write(1, b"half-way\\n")
    time.sleep(600)

def renaming(old, new):
    if moment == "between the renames" and Path(new) == Path(output):
        stop()
    rename(old, new)

def removing(path, **options):
    if moment == "before the old one is removed" and Path(path).name == f".{Path(output).name}.old":
        if Path(path).exists():
            stop()
    rmtree(path, **options)

os.rename, shutil.rmtree = renaming, removing
export_opt(source, output, OPTNeuronConfig(sequence_length=64, batch_size=2), eager=True)
"""


def kill_while_swapping(moment: str, source: Path, tmp_path: Path) -> tuple[dict, dict]:
    """Kills an export that replaces `out`; returns the snapshots of what was there before and of what it wrote."""
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    replaced = snapshot(output)
    written = snapshot(export_opt(source, tmp_path / "expected", neuron_config(batch_size=2), eager=True))
    assert replaced != written
    shutil.rmtree(tmp_path / "expected")
    kill_half_way(KILLED_WHILE_SWAPPING.replace("MOMENT", moment), source, output)
    return replaced, written


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_killed_between_the_renames_both_are_whole_and_the_next_run_repairs(source, tmp_path):
    replaced, written = kill_while_swapping("between the renames", source, tmp_path)
    assert names(tmp_path) == {"source", ".out.old", ".out.partial", ".out.lock"}
    assert snapshot(tmp_path / ".out.old") == replaced
    assert snapshot(tmp_path / ".out.partial") == written
    # A run that fails has put the old one back first; so does one that finds an empty directory in its place.
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError):
        export_opt(broken, tmp_path / "out", neuron_config(), eager=True)
    assert names(tmp_path) == {"source", "broken", "out"}
    assert snapshot(tmp_path / "out") == replaced
    export_opt(source, tmp_path / "out", neuron_config(batch_size=2), eager=True)
    assert names(tmp_path) == {"source", "broken", "out"}
    assert snapshot(tmp_path / "out") == written


def test_killed_between_the_renames_the_next_run_replaces_it(source, tmp_path):
    _, written = kill_while_swapping("between the renames", source, tmp_path)
    export_opt(source, tmp_path / "out", neuron_config(batch_size=2), eager=True)
    assert snapshot(tmp_path / "out") == written
    assert names(tmp_path) == {"source", "out"}


def test_killed_before_the_old_one_is_removed_the_new_one_is_there(source, tmp_path):
    _, written = kill_while_swapping("before the old one is removed", source, tmp_path)
    assert names(tmp_path) == {"source", "out", ".out.old", ".out.lock"}
    assert snapshot(tmp_path / "out") == written
    export_opt(source, tmp_path / "out", neuron_config(batch_size=2), eager=True)
    assert snapshot(tmp_path / "out") == written
    assert names(tmp_path) == {"source", "out"}


def test_a_swap_that_fails_puts_the_old_one_back(source, tmp_path, monkeypatch):
    output = export_opt(source, tmp_path / "out", neuron_config(), eager=True)
    before, rename = snapshot(tmp_path), os.rename

    def failing(old, new):
        if Path(old).name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export_opt(source, output, neuron_config(batch_size=2), eager=True)
    assert snapshot(tmp_path) == before


def test_two_exports_of_the_same_output(source, tmp_path):
    config = neuron_config()
    with one_writer(tmp_path / "out"), pytest.raises(BlockingIOError, match="out is being written by another .*wait"):
        export_opt(source, tmp_path / "out", config, eager=True)
    assert not (tmp_path / "out").exists()
    export_opt(source, tmp_path / "out", config, eager=True)


def test_a_split_source_of_the_same_amp_is_linked(source, tmp_path):
    split = save_pretrained_split(source, tmp_path / "split", "f16")
    before = snapshot(split)
    for source_of_it in (split, export_opt(split, tmp_path / "export", neuron_config(), eager=True)):
        output = export_opt(source_of_it, tmp_path / "out", neuron_config(batch_size=2), eager=True)
        for file in split.glob("*.safetensors"):
            assert (output / "checkpoint" / file.name).samefile(file)
        verify_checkpoint(output)
    shutil.rmtree(tmp_path / "export")
    assert snapshot(split) == before
    other = export_opt(split, tmp_path / "other", neuron_config(amp="bf16"), eager=True)
    assert not any((other / "checkpoint" / file.name).samefile(file) for file in split.glob("*.safetensors"))
    verify_checkpoint(other)


def test_a_split_source_that_is_damaged_is_not_linked(source, tmp_path):
    split = save_pretrained_split(source, tmp_path / "split", "f16")
    file = split / "layer_001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="layer_001.safetensors is broken"):
        export_opt(split, tmp_path / "out", neuron_config(), eager=True)
    assert not (tmp_path / "out").exists()


def test_without_links_files_are_copied(source, tmp_path, monkeypatch):
    split = save_pretrained_split(source, tmp_path / "split", "f16")

    def refuse(*arguments, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    output = export_opt(split, tmp_path / "out", neuron_config(), eager=True)
    for file in split.glob("*.safetensors"):
        copy = output / "checkpoint" / file.name
        assert copy.read_bytes() == file.read_bytes() and not copy.samefile(file)


def test_other_models_are_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="source is of model_type 'gpt2', and optimum_opt_trn serves only 'opt'"):
        export_opt(tmp_path / "source", tmp_path / "out", neuron_config(), eager=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 225}, "sequence_length=225 exceeds the 224 positions"),
        ({"tp_degree": 3}, "tp_degree=3 cannot split 4 attention heads.*choose one of 1, 2, 4"),
        ({"tp_degree": 8}, "tp_degree=8 cannot split"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_opt(source, tmp_path / "deep" / "out", neuron_config(**options), eager=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.skipif(shutil.which("neuronx-cc") is not None, reason="the Neuron SDK is installed")
@pytest.mark.parametrize("instance_type", ["trn1", "trn1n", "inf2", "trn2"])
def test_neuron_without_the_sdk(instance_type, source, tmp_path):
    missing = ": the Neuron SDK" if INSTALLED else " needs optimum-neuron 0.4.5, which"
    with pytest.raises(RuntimeError, match=f"instance_type='{instance_type}'{missing} .*is not installed"):
        export_opt(source, tmp_path / "deep" / "out", neuron_config(instance_type=instance_type))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty has no config.json"):
        export_opt(tmp_path / "empty", tmp_path / "out", neuron_config())
    with pytest.raises(OSError, match="nowhere"):
        export_opt(tmp_path / "deep" / "nowhere", tmp_path / "out", neuron_config(), local_files_only=True)
    with pytest.raises(OSError):  # transformers' message
        export_opt("no/such-model", tmp_path / "out", neuron_config(), local_files_only=True)
    with pytest.raises(OSError, match="nowhere"):  # with a given configuration, too
        export_opt(tmp_path / "deep" / "nowhere", tmp_path / "out", neuron_config(), config=OPTConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_export_is_exported_again_from_its_checkpoint(source, tmp_path):
    first = export_opt(source, tmp_path / "first", neuron_config(), eager=True)
    wider = OPTNeuronConfig(sequence_length=32, batch_size=3, tp_degree=2)
    second = export_opt(first, tmp_path / "second", wider, eager=True)
    assert OPTNeuronConfig.from_pretrained(second) == wider
    for file in (first / "checkpoint").glob("*.safetensors"):
        assert (second / "checkpoint" / file.name).read_bytes() == file.read_bytes()


def test_a_link_stays_and_what_it_points_to_is_replaced(source, tmp_path):
    real = export_opt(source, tmp_path / "real", neuron_config(), eager=True)
    (tmp_path / "link").symlink_to(real)
    export_opt(source, tmp_path / "link", OPTNeuronConfig(sequence_length=32), eager=True)
    assert (tmp_path / "link").is_symlink()
    assert OPTNeuronConfig.from_pretrained(real).sequence_length == 32
    assert {path.name for path in tmp_path.iterdir()} == {"source", "real", "link"}
