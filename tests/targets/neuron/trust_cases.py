"""Compiled models that were not made here are loaded only on request; on the double, run by test_target.py."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from double_cases import GREEDY, export, neuron_host, ragged  # noqa: F401 - this import installs the double
from hub_server import HubServer
from optimum.commands import optimum_cli
from small_models import SHIPPED_MODEL, tiny_opt
from transformers import AutoTokenizer

from optimum_opt_trn import NeuronOPTForCausalLM, pipeline
from optimum_opt_trn.targets.manifest import sha256
from optimum_opt_trn.targets.neuron import trust


ASKED = "model.pt is code .*trust_remote_code=True"


@pytest.fixture(autouse=True)
def loads(monkeypatch, tmp_path) -> list[str]:
    """Another process of a user without records; what torch.jit.load is called with."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_compiled_here", set())
    load, files = torch.jit.load, []
    monkeypatch.setattr(
        torch.jit, "load", lambda file: (files.append(file) if isinstance(file, str) else None) or load(file)
    )
    return files


SMALL = {"amp": "f32", "tp_degree": 2, "prompt_buckets": (48,), "cache_buckets": (48,)}


@pytest.fixture(scope="module")
def of_another_user(tmp_path_factory) -> Path:
    monkeypatch, root = pytest.MonkeyPatch(), tmp_path_factory.mktemp("other")
    for name in ("NEURON_COMPILE_CACHE_URL", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(root / name))
    out = export(root, tiny_opt(vocab_size=5000, num_hidden_layers=1), **SMALL)
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(out)
    monkeypatch.undo()
    return out


@pytest.fixture
def downloaded(of_another_user, tmp_path) -> Path:
    """An export that another user made, with a tokenizer."""
    return Path(shutil.copytree(of_another_user, tmp_path / "downloaded"))


def test_what_was_compiled_here_loads_in_another_process_and_from_another_place(tmp_path, loads):
    out = export(tmp_path, tiny_opt(num_hidden_layers=1), **SMALL)
    digest = sha256(out / "compiled" / "model.pt")
    assert [file.name for file in (tmp_path / "state/optimum_opt_trn/compiled").iterdir()] == [digest]
    trust._compiled_here.clear()
    shutil.move(out, tmp_path / "moved")
    NeuronOPTForCausalLM.from_pretrained(tmp_path / "moved").generate(**ragged(128), **GREEDY)
    assert len(loads) == 1


def test_what_was_compiled_elsewhere_is_asked_for(downloaded, loads):
    with pytest.raises(ValueError, match=ASKED) as error:
        NeuronOPTForCausalLM.from_pretrained(downloaded)
    assert "optimum-cli export neuron -m" in str(error.value) and "eager=True" in str(error.value)
    with pytest.raises(ValueError, match=ASKED):
        NeuronOPTForCausalLM.from_pretrained(downloaded, trust_remote_code=False)
    assert loads == []
    NeuronOPTForCausalLM.from_pretrained(downloaded, eager=True).generate(**ragged(128), **GREEDY)
    assert loads == []
    trusting = NeuronOPTForCausalLM.from_pretrained(downloaded, trust_remote_code=True)
    trusting.generate(**ragged(128), **GREEDY)
    assert len(loads) == 1
    with pytest.raises(ValueError, match=ASKED):  # trust is for one call
        NeuronOPTForCausalLM.from_pretrained(downloaded)


def test_another_file_in_an_export_of_this_host(downloaded, loads):
    """Its manifest fits; the record does not."""
    out, file = downloaded, downloaded / "compiled" / "model.pt"
    trust.record_compiled(sha256(file))
    torch.jit.save(torch.jit.script(torch.nn.Identity()), file)
    manifest = json.loads((out / "compiled" / "manifest.json").read_text())
    manifest["artifacts"]["model.pt"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (out / "compiled" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=ASKED):
        NeuronOPTForCausalLM.from_pretrained(out)
    assert loads == []


def test_exports_from_it_are_of_this_host(downloaded, tmp_path, loads):
    """The way out that the message names: only its checkpoint is read."""
    again = NeuronOPTForCausalLM.from_pretrained(downloaded, export=True, instance_type="inf2", sequence_length=32,
                                                 tensor_parallel_size=2, amp="f32")  # fmt: skip
    again.save_pretrained(tmp_path / "again")
    trust._compiled_here.clear()
    assert downloaded / "compiled" / "model.pt" not in map(Path, loads)
    NeuronOPTForCausalLM.from_pretrained(tmp_path / "again")


def test_pipelines(downloaded):
    import fake_sdk

    fake_sdk.PACKAGES.add("sentence_transformers")  # which optimum.neuron.pipeline imports, for another task
    from optimum.neuron.pipelines.transformers.base import pipeline as neuron_pipeline

    with pytest.raises(ValueError, match=ASKED):
        pipeline("text-generation", str(downloaded))
    ours = pipeline("text-generation", str(downloaded), trust_remote_code=True)
    assert ours("It was", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("It was")
    with pytest.raises(ValueError, match=ASKED):
        neuron_pipeline("text-generation", str(downloaded))
    neuron_pipeline("text-generation", str(downloaded), trust_remote_code=True)


def test_the_command(downloaded, monkeypatch, capsys):
    command = ["optimum-cli", "neuron", "generate", str(downloaded), "It was", "--max_new_tokens", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code == 1 and "--trust_remote_code" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", [*command, "--trust_remote_code"])
    optimum_cli.main()


def test_through_the_hub(downloaded, loads, monkeypatch, tmp_path):
    with HubServer() as server:
        server.add("somebody/opt", downloaded, large=(".safetensors", ".pt"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("_api", "api"):
            if hasattr(__import__("huggingface_hub").hf_api, name):
                monkeypatch.setattr(getattr(__import__("huggingface_hub").hf_api, name), "endpoint", server.endpoint)
        hub = {"cache_dir": tmp_path / "hub"}
        with pytest.raises(ValueError, match=ASKED):
            NeuronOPTForCausalLM.from_pretrained("somebody/opt", **hub)
        assert loads == []
        NeuronOPTForCausalLM.from_pretrained("somebody/opt", trust_remote_code=True, **hub)
        assert len(loads) == 1


def test_where_nothing_can_be_recorded(tmp_path, monkeypatch, caplog):
    """This process can use what it compiled; another one asks."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    out = export(tmp_path, tiny_opt(num_hidden_layers=1), **SMALL)
    assert any("could not be recorded" in record.getMessage() for record in caplog.records)
    NeuronOPTForCausalLM.from_pretrained(out)
    trust._compiled_here.clear()
    with pytest.raises(ValueError, match=ASKED):
        NeuronOPTForCausalLM.from_pretrained(out)


def test_a_relative_state_directory_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    trust.record_compiled("0" * 64)
    assert (tmp_path / ".local/state/optimum_opt_trn/compiled" / ("0" * 64)).is_file()
    assert not os.path.exists("state")
