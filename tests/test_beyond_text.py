"""The snippets of docs/beyond_text.md run, in their order, on small models under the names that the page uses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_adapters import make_adapter
from small_blip2 import QUERIES, tiny_blip2
from small_models import SHIPPED_MODEL, tiny_opt
from transformers import AutoTokenizer, Blip2Processor, BlipImageProcessor


PAGE = Path(__file__).parents[1] / "docs" / "beyond_text.md"


def test_snippets_run(tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    opt = tiny_opt(vocab_size=len(tokenizer), max_position_embeddings=256)
    opt.save_pretrained(tmp_path / "opt-125m")
    tokenizer.save_pretrained(tmp_path / "opt-125m")
    for seed, name in enumerate(("my-lora", "other-lora")):
        make_adapter(tmp_path / name, opt, seed)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)
    processor.save_pretrained(tmp_path / "blip2-opt-2.7b")
    blip2 = tiny_blip2(vocab_size=len(processor.tokenizer), max_position_embeddings=256)
    blip2.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    blip2.save_pretrained(tmp_path / "blip2-opt-2.7b")

    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 5
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    known: dict = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), known)
    said = capsys.readouterr().out
    assert "4 steps of 3 tensors" in said and "('my-lora=0.5', 'other-lora')" in said
    assert known["probe"].weight.grad.abs().sum() > 0
    assert known["answer"].shape[0] == 1 and known["logprobs"].shape == (2, 4)
