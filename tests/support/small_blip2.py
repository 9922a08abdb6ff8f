"""A small random BLIP-2, and images as its processor makes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from small_models import tiny_config, tiny_opt
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor


IMAGE_TOKEN, QUERIES = 127, 4


def tiny_blip2(seed: int = 0, **opt) -> Blip2ForConditionalGeneration:
    """A float32 BLIP-2 with random weights, whose language model is `tiny_opt(**opt)`."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    qformer = {
        "vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
    }
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=tiny_config(**opt).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("language_model."):
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.language_model = tiny_opt(seed, **opt)
    return model


def prompts(count: int, words: int = 5) -> dict[str, Tensor]:
    """`count` images with questions of different lengths, as Blip2Processor returns them."""
    y, x = np.mgrid[:40, :50]
    images = [
        Image.fromarray(np.stack([x * 5 % 256, y * 6 % 256, (x * (i + 1) + y) % 256], axis=-1).astype(np.uint8))
        for i in range(count)
    ]
    processor = BlipImageProcessor(size={"height": 28, "width": 28})
    generator = torch.Generator().manual_seed(1)
    width = QUERIES + 1 + words
    ids, mask = torch.ones(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.long)
    for row in range(count):
        used = width - row % words  # padded at the left
        question = torch.randint(4, 120, (used - QUERIES - 1,), generator=generator)
        ids[row, width - used :] = torch.cat([torch.tensor([IMAGE_TOKEN] * QUERIES + [2]), question])
        mask[row, width - used :] = 1
    pixels = processor(images, return_tensors="pt").pixel_values
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
