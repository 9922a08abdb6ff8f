"""Writing safetensors files in pieces, with their hashes, so that no whole file or tensor is in memory.

The format is https://github.com/huggingface/safetensors#format: the header's length in eight bytes, a JSON header
padded with spaces, and the tensors' bytes without gaps. Here the bytes begin where a page of memory does, and so do
those of matrices, as long as they fill whole pages. A processor follows a row of weights to the end of its page, and
rows that lie across two pages took up to a third longer to read.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dtypes import DTYPES
from .layout import TensorSpec


# How many chunks may wait to be hashed and written.
_AHEAD = 4

# Bytes that one system call writes, as many as cp does. After larger calls the kernel caches the file in larger pages.
# Where those are scarce (a virtual machine that returns free memory to its host), that took up to ten times as long.
_WRITE_BYTES = 128 * 1024

# Bytes of a page of memory; processors with larger ones begin those at multiples of it, too.
PAGE = 4096

# Called with the number of bytes written or read since the last call.
Progress = Callable[[int], Any]


def write_tensors(
    file: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterator[Tensor]],
    progress: Progress,
) -> tuple[int, str]:
    """Writes a safetensors file; returns its size in bytes and its SHA-256.

    Args:
        file: the path to write to; no temporary file is made.
        specs: the tensors.
        chunks: yields the contiguous pieces of a tensor, in its dtype and in order.
        progress: called with the bytes of tensors that were written.
    """
    # Whole pages first, and of the rest wide types: every tensor is aligned.
    names = sorted(specs, key=lambda name: (specs[name].bytes % PAGE != 0, -DTYPES[specs[name].dtype].bytes, name))
    header = _header({name: specs[name] for name in names})
    digest = hashlib.sha256(header)
    # Two threads hash and write a chunk (both free the interpreter) while this one reads and casts the next.
    with (
        file.open("wb", buffering=0) as output,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as writer,
        _one_torch_thread(),
    ):
        _write_all(output, memoryview(header))
        pending: deque[Future[None]] = deque()
        for name in names:
            for chunk in chunks(name):
                content = chunk.flatten().view(torch.uint8).numpy().data
                while len(pending) >= 2 * _AHEAD:
                    pending.popleft().result()
                pending += hasher.submit(digest.update, content), writer.submit(_write_all, output, content)
                progress(len(content))
        for future in pending:
            future.result()
        size = output.tell()
    return size, digest.hexdigest()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One thread casts faster than one hashes. More torch threads would spin on cores that hashing needs."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    # The metadata is what transformers reads to know that the tensors are PyTorch's.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.bytes
        entries[name] = {
            "dtype": DTYPES[spec.dtype].safetensors,
            "shape": spec.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _write_all(output: Any, content: memoryview) -> None:
    while len(content):
        content = content[output.write(content[:_WRITE_BYTES]) :]
