"""Reading OPT weights, a few megabytes at a time, whatever they are stored in."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ..dtypes import to_torch
from .adapter import Adapter
from .formats import Piece, Readers
from .layout import LANGUAGE_MODEL, CheckpointError, FileSpecs, canonical_name
from .manifest import source_key


# Bytes of a tensor that are read, cast, checked and written at a time, in the wider dtype of source and output.
CHUNK_BYTES = 16 << 20

# Not read if the model has no such tensor: a version of the first OPT conversions, which transformers ignores as well,
# and a copy of a tied head.
_IGNORED = {"model.decoder.version", "lm_head.weight"}


class WeightSource:
    """The weights of a model: named tensors that are read when they are asked for.

    Args:
        pieces: the files, or other parts, that have them.
        origin: what error messages call the source.
        files: what the model consists of, in which dtypes the tensors are read, and which belong together.
        directory: the source's directory, if it is a local one.
        adapters: what is merged into the weights, in this order; they have been checked.

    Raises:
        CheckpointError: naming tensors that the model has and the source lacks, or the other way round, or that are
            of another shape, as far as their pieces are open.
    """

    def __init__(
        self,
        pieces: list[Piece],
        origin: str,
        files: FileSpecs,
        directory: Path | None = None,
        adapters: Sequence[Adapter] = (),
    ):
        self.origin = origin
        self.files = files
        self.directory = directory
        self._adapters = adapters
        self._specs = {name: spec for specs in files.values() for name, spec in specs.items()}
        self._pieces = pieces
        # Our name -> the piece that has it, and the name there.
        self._tensors: dict[str, tuple[int, str]] = {}
        is_part = any(name.startswith(LANGUAGE_MODEL) for piece in pieces for name in piece.names)
        for index, piece in enumerate(pieces):
            for name in piece.names:
                if name.startswith(LANGUAGE_MODEL) or not is_part:
                    self._tensors[canonical_name(name)] = index, name
        self._check()

    def _check(self) -> None:
        """Checks names, and the shapes of the tensors in open pieces."""
        missing = self._specs.keys() - self._tensors.keys()
        foreign = self._tensors.keys() - self._specs.keys() - _IGNORED
        for names, what in ((missing, "lacks"), (foreign, "holds, beyond what config.json says,")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                raise CheckpointError(f"{self.origin} {what} {len(names)} tensors: {shown}. Is it whole, and an OPT?")
        for name in self._specs:
            if self._pieces[self._tensors[name][0]].is_open:
                self._tensor(name)

    def key(self, file: str) -> str:
        """The manifest's key of what `file` is made from (see `source_key`)."""
        pieces: dict[int, list[str]] = {}
        specs = self.files[file]
        for name in sorted(specs):
            index, theirs = self._tensors[name]
            pieces.setdefault(index, []).append(theirs)
        identities = [self._pieces[index].identity(theirs) for index, theirs in sorted(pieces.items())]
        identities += [adapter.identity for adapter in self._adapters if any(map(adapter.changes, specs))]
        return source_key(specs, "\n".join(identities))

    def is_merged(self, file: str) -> bool:
        """Whether an adapter changes a tensor of `file`."""
        return any(adapter.changes(name) for adapter in self._adapters for name in self.files[file])

    def in_order(self, files: Collection[str]) -> Iterator[str]:
        """Yields some of `self.files` in the order that opens each piece once.

        A piece is closed as soon as the file that was yielded last and those that follow do not need it.
        """
        ordered = sorted(files, key=lambda file: (max(self._pieces_of(file)), file))
        held = self._pieces_of(*self.files)
        for done in range(len(ordered) + 1):
            needed = self._pieces_of(*ordered[done:])
            for index in held - needed:
                self._pieces[index].close()
            held = needed
            yield from ordered[done : done + 1]

    def _pieces_of(self, *files: str) -> set[int]:
        return {self._tensors[name][0] for file in files for name in self.files[file]}

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows, some at a time, in its dtype in `files`, contiguous.

        Raises:
            CheckpointError: if the tensor is missing, has another shape or no floating-point dtype, or has values
                that are not finite after the cast.
        """
        tensor, dtype = self._tensor(name), to_torch(self._specs[name].dtype)
        adapters = [adapter for adapter in self._adapters if adapter.changes(name)]
        item_bytes = max(tensor.element_size(), dtype.itemsize)
        if adapters:  # there are two copies then: the sum in float32, and what it is cast to
            item_bytes = torch.float32.itemsize + dtype.itemsize
        row_bytes = max(1, tensor[0].numel() * item_bytes)
        start = 0
        for rows in tensor.split(max(1, CHUNK_BYTES // row_bytes)):
            try:
                if adapters:
                    rows = rows.to("cpu", torch.float32, copy=True)
                    for adapter in adapters:
                        adapter.add_to(rows, name, start)
                    start += len(rows)
                cast = rows.to("cpu", dtype).contiguous()
                # Both are NaN if any element is. This is several times faster than isfinite of each element.
                extremes = torch.stack(torch.aminmax(cast))
            except RuntimeError as error:
                raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error
            if not torch.isfinite(extremes).all():
                cause = "in the source" if not torch.isfinite(rows).all() else f"once cast to {cast.dtype}: try bf16"
                raise CheckpointError(f"{self.origin}: {name} has values that are not finite {cause}.")
            yield cast

    def read(self, name: str) -> Tensor:
        """The tensor as a whole; see `chunks`."""
        return torch.cat(list(self.chunks(name)))

    def _tensor(self, name: str) -> Tensor:
        index, theirs = self._tensors[name]
        shape = self._specs[name].shape
        try:
            tensor = self._pieces[index].read(theirs)
        except KeyError as error:
            raise CheckpointError(f"{self.origin} lacks the tensor {name}, which its index names.") from error
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {shape}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.origin}: {name} has dtype {tensor.dtype}, not a floating-point dtype.")
        if tensor.is_meta:
            raise CheckpointError(f"{self.origin}: {name} has no data: it is on the meta device.")
        return tensor


def open_model(model: PreTrainedModel, files: FileSpecs, adapters: Sequence[Adapter] = ()) -> WeightSource:
    """The weights of a loaded `OPTForCausalLM`, which is not changed; other arguments and errors as `WeightSource`."""
    state = model.state_dict()

    def identity(names: Collection[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            tensor = state[name].detach()
            digest.update(f"{name} {tensor.dtype}".encode())
            for rows in tensor.split(max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))):
                digest.update(rows.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    readers: Readers = {name: tensor.detach for name, tensor in state.items()}
    return WeightSource([Piece(lambda: readers, identity)], "the loaded model", files, None, adapters)
