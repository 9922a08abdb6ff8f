"""The three example programs, as a user starts them."""

import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from requirements import needs_optimum_neuron
from safetensors import safe_open
from small_models import tiny_opt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = ["It was a fine morning, and nobody in the house was awake.", "The capital of France is Paris, they say."] * 8


def run(name: str, *arguments, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in OPT's convention: `</s>` = 2 starts every text, `<pad>` = 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("examples") / "tiny"
    tokenizer = opt_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_opt(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ["download", "split", "demo"])
def test_help_teaches(name, tmp_path):
    result = run(name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "facebook/opt-13b" in result.stdout
    assert f"python examples/{name}.py" in result.stdout, "an example of its use"


def test_download_checks_a_local_checkpoint(checkpoint, tmp_path):
    result = run("download", checkpoint, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "is whole: OPT, 2 layers" in result.stdout and "split.py" in result.stdout

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = run("download", broken, cwd=tmp_path)
    assert result.returncode == 1 and "model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, serving `directory` as tiny/opt."""

    directory: Path
    fetched: set[str]

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        if self.path.startswith("/api/models/tiny/opt"):
            files = [path for path in self.directory.iterdir() if path.is_file()]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            model = {"id": "tiny/opt", "sha": "0" * 40, "siblings": [{"rfilename": f.name} for f in files]}
            data, kind = json.dumps(tree if "/tree/" in self.path else model).encode(), "application/json"
        elif (name := self.path.rsplit("/", 1)[-1]) and (self.directory / name).is_file():
            data, kind = (self.directory / name).read_bytes(), "application/octet-stream"
            self.fetched.add(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{abs(hash(data)):032x}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)


def test_download_fetches_what_is_needed(checkpoint, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(checkpoint, served)
    for other in ("flax_model.msgpack", "tf_model.h5", "pytorch_model.bin"):
        (served / other).write_bytes(b"not wanted")
    Hub.directory, Hub.fetched = served, set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        home = str(tmp_path / "home")
        result = run("download", "tiny/opt", cwd=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=home)
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert "opt is whole" in result.stdout
    assert "model.safetensors" in Hub.fetched
    assert not Hub.fetched & {"flax_model.msgpack", "tf_model.h5", "pytorch_model.bin"}
    assert (tmp_path / "opt" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_split_then_demo(checkpoint, tmp_path, monkeypatch, capsys):
    result = run("split", checkpoint, "tiny-split", "--amp", "bf16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "tiny-split").glob("*.safetensors"))
    assert len(files) == 3 and "3 files" in result.stdout
    with safe_open(files[-1], "pt") as layer:
        dtypes = {name: layer.get_slice(name).get_dtype() for name in layer.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in dtypes.items() if "fc1" in name} == {"BF16"}
    assert {dtype for name, dtype in dtypes.items() if "layer_norm" in name} == {"F32"}

    options = ("--max_new_tokens", 12, "--eager")
    prompt = "It was a fine morning, and"
    first = run(
        "demo", "tiny-split", *options, "--tensor_parallel_size", 2, "--auto_cast_type", "bf16", "--output", "kept",
        cwd=tmp_path,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert prompt in first.stdout
    assert re.search(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s in a batch of 1,.*bf16, tp 2", first.stdout)
    assert (tmp_path / "kept" / "neuron_config.json").is_file()

    again = run("demo", "kept", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert text_of(again) == text_of(first), "the same seed writes the same"

    for arguments, problem in {
        (tmp_path / "kept", "--batch_size", 2): "batch_size=1",
        (tmp_path / "kept", "--output", tmp_path / "kept"): "exists",
        (tmp_path / "nowhere",): "nowhere",
        (checkpoint, "--eager", "--prompt", "word " * 80): "sequence_length=64",
        (checkpoint, "--eager", "--tensor_parallel_size", 3): "tp_degree=3",
    }.items():
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
        assert runpy.run_path(str(EXAMPLES / "demo.py"))["main"]() == 1
        assert problem in capsys.readouterr().err


def test_demo_writes_several_texts(checkpoint, tmp_path):
    prompts = ("It was", "The capital of France is")
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    result = run("demo", checkpoint, *arguments, "--max_new_tokens", 8, "--greedy", "--eager", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(f"\n{prompt}" in result.stdout for prompt in prompts)
    assert "in a batch of 2" in result.stdout


def text_of(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout.split("-" * 80)[1]


def test_fixture_tokenizer_is_opts(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("It")["input_ids"][0] == 2 and tokenizer.pad_token_id == 1


@needs_optimum_neuron
def test_validation_rehearsed_on_a_host_without_devices(tmp_path):
    """Every part but those that ask the devices; one that fails is told, and the others go on."""
    model = EXAMPLES / "models" / "opt-austen"
    arguments = ["--cpu", "--sequence_length", 64, "--batch_size", 2, "--output", "out", "--models", model, "nowhere"]
    result = run("validate_on_trn", *arguments, cwd=tmp_path)
    assert result.returncode == 1 and "1 of 2 models agree with the reference; 1 parts failed" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["environment"]["versions"]["optimum-opt-trn"] and "error" not in report["environment"]
    assert report[str(model)]["parity"]["prompts_with_equal_tokens"] == "4 of 4"
    assert report[str(model)]["speed"]["decode_ms"] > 0
    assert "nowhere" in report["nowhere"]["export"]["error"]
    assert "largest_logit_error_sigma" in (tmp_path / "out" / "report.md").read_text()
