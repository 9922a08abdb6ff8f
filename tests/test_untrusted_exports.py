"""An export for cpu that somebody else made is data: whatever code is put into it, none of it runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from small_models import SHIPPED_MODEL, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, pipeline
from optimum_opt_trn.checkpoint.verify import find_problems
from optimum_opt_trn.export import export_opt


PROMPT = torch.tensor([[2, 17, 99, 4, 56]])

# Opens an export in a process of its own, which asks a hub of its own.
OPEN = """
import sys, torch
from optimum_opt_trn import NeuronOPTForCausalLM, pipeline
NeuronOPTForCausalLM.from_pretrained(sys.argv[1]).generate(torch.tensor([[2, 17, 99]]), max_new_tokens=2)
pipeline("text-generation", sys.argv[1])("It was", max_new_tokens=2)
"""


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that is there as soon as any code of the export has run."""
    return tmp_path / "code ran"


@pytest.fixture
def export(save_opt, tmp_path) -> Path:
    source = save_opt(tiny_opt(vocab_size=5000))
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(source)
    return export_opt(source, tmp_path / "export", OPTNeuronConfig(sequence_length=32))


def library(file: Path, marker: Path) -> None:
    """A shared library whose constructor makes the marker."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    file.parent.mkdir(parents=True, exist_ok=True)
    code = f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fclose(fopen("{marker}", "w")); }}\n'
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", file], input=code.encode(), check=True)


def module(file: Path, marker: Path) -> None:
    """A module that makes the marker when it is imported, with every class that it could be asked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"Tokenizer = Config = Model = generate = object\nopen({str(marker)!r}, 'w').close()\n")


class Evil:
    """An object whose unpickling makes the marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def old_library(export: Path, marker: Path) -> None:
    """As an earlier version wrote it: a manifest in which the library's size and hash fit."""
    file = export / "compiled" / "kernels.so"
    shutil.rmtree(export / "compiled")
    library(file, marker)
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    host = {"torch": torch.__version__, "machine": os.uname().machine}
    manifest = {"host": host, "source": "0" * 64, "artifacts": {"kernels.so": entry}}
    (export / "compiled" / "manifest.json").write_text(json.dumps(manifest))


def new_library(export: Path, marker: Path) -> None:
    """Under the names that the package's own have, and listed in the manifest of today."""
    manifest = json.loads((export / "compiled" / "manifest.json").read_text())
    for name in ("_kernels.abi3.so", "kernels.so"):
        library(export / "compiled" / name, marker)
        library(export / name, marker)
        content = (export / "compiled" / name).read_bytes()
        manifest["artifacts"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (export / "compiled" / "manifest.json").write_text(json.dumps(manifest))


def remote_code(export: Path, marker: Path) -> None:
    """Python modules that transformers loads for models that ask for them, with trust_remote_code."""
    module(export / "evil.py", marker)
    module(export / "custom_generate" / "generate.py", marker)
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(export / "config.json", auto_map=classes)
    change(export / "checkpoint" / "config.json", auto_map=classes)
    change(export / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})


def pickles(export: Path, marker: Path) -> None:
    """Next to the weights, and instead of them."""
    for name in ("pytorch_model.bin", "checkpoint/pytorch_model.bin", "compiled/model.pt", "generation_config.pkl"):
        torch.save({"lm_head.weight": Evil(marker)}, export / name)


EVIL = {"old library": old_library, "new library": new_library, "remote code": remote_code, "pickles": pickles}


def opened(name: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OPEN, name], cwd=where, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("kind", EVIL)
def test_nothing_runs_out_of_a_directory(kind, export, marker, caplog):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = NeuronOPTForCausalLM.from_pretrained(export).generate(PROMPT, **options)
    assert find_problems(export) == []
    caplog.clear()
    EVIL[kind](export, marker)
    assert torch.equal(NeuronOPTForCausalLM.from_pretrained(export).generate(PROMPT, **options), expected)
    if "library" in kind:
        assert any(
            "kernels.so, which is not loaded: an export for cpu is data" in r.getMessage() for r in caplog.records
        )
    NeuronOPTForCausalLM.from_pretrained(export, eager=True)
    NeuronOPTForCausalLM.from_pretrained(export, export=True, sequence_length=16, eager=True)
    pipeline("text-generation", str(export))("It was", max_new_tokens=2)
    assert not marker.exists()
    assert find_problems(export)


def test_nothing_runs_out_of_a_download(export, marker, tmp_path):
    for put in (old_library, remote_code, pickles):
        put(export, marker)
    with HubServer() as hub:
        hub.add("somebody/opt", export)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        result = opened("somebody/opt", tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert not marker.exists()
    assert "kernels.so, model.pt, which is not loaded: an export for cpu is data" in result.stderr
    for name in ("kernels.so", "evil.py", "generation_config.pkl"):
        assert list((tmp_path / "home").rglob(name)), "it was downloaded"


def test_the_code_would_be_noticed(tmp_path, marker):
    """Each kind of code makes the marker if it is run."""
    library(tmp_path / "a.so", marker)
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(tmp_path / 'a.so')!r})"], check=True)
    assert marker.exists()
    marker.unlink()
    module(tmp_path / "evil.py", marker)
    subprocess.run([sys.executable, "-c", "import evil"], cwd=tmp_path, check=True)
    assert marker.exists()
    marker.unlink()
    torch.save(Evil(marker), tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False).close()
    assert marker.exists()


def test_a_pickle_with_code_as_the_source_is_refused(tmp_path, marker):
    tiny_opt().config.save_pretrained(tmp_path / "source")
    torch.save({"lm_head.weight": Evil(marker)}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is broken or not a checkpoint file"):
        NeuronOPTForCausalLM.from_pretrained(tmp_path / "source", sequence_length=32)
    assert not marker.exists()


def test_a_pipeline_asks_for_nothing_of_cpu(export):
    """trust_remote_code is accepted, and changes nothing."""
    assert pipeline("text-generation", str(export), trust_remote_code=True)("It was", max_new_tokens=2)
