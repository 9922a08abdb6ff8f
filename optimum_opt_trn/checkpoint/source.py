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
from .layout import HEAD, LANGUAGE_MODEL, SCALE, CheckpointError, FileSpecs, canonical_name
from .manifest import source_key
from .quantization import PACKED, SHAPE, quantize, scales, signed, unpack


# Bytes of a tensor that are read, cast, checked and written at a time, in the wider dtype of source and output. glibc
# keeps freed blocks of up to 32 MiB in its heap. With chunks of 16 MiB that was up to 100 MB, and no faster.
CHUNK_BYTES = 2 << 20

# Dtypes of the integers of a matrix with scales: as they are, and from a packed matrix.
_INTEGERS = (torch.int8, torch.uint8)

# Of an element that is quantized, in float32: itself, its row's share of temporary tensors, and the result.
_QUANTIZING_BYTES = 16

# Not read if the model has no such tensor: a version of the first OPT conversions, which transformers ignores as well,
# and a copy of a tied head.
_IGNORED = {"model.decoder.version", HEAD}


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
        # Our name -> the piece that has it, and the name there; the scales of int8 matrices by the matrices' names.
        self._tensors: dict[str, tuple[int, str]] = {}
        self._scales: dict[str, tuple[int, str]] = {}
        is_part = any(name.startswith(LANGUAGE_MODEL) for piece in pieces for name in piece.names)
        for index, piece in enumerate(pieces):
            for name in piece.names:
                if is_part and not name.startswith(LANGUAGE_MODEL):
                    continue
                ours = canonical_name(name)
                matrix, suffix = _split_name(ours)
                if suffix and matrix not in self._specs:
                    self._tensors[ours] = index, name
                elif suffix == SCALE:
                    self._scales[matrix] = index, name
                elif suffix != SHAPE:  # config.json has the shapes
                    self._tensors[matrix] = index, name
        self._check()

    def _check(self) -> None:
        """Checks names, and the shapes of the tensors in open pieces."""
        missing = {name for name in self._specs if self._matrix(name) not in self._tensors}
        foreign = self._tensors.keys() - self._specs.keys() - _IGNORED
        for names, what in ((missing, "lacks"), (foreign, "holds, beyond what config.json says,")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                raise CheckpointError(f"{self.origin} {what} {len(names)} tensors: {shown}. Is it whole, and an OPT?")
        for name in self._specs:
            if self._pieces[self._tensors[self._matrix(name)][0]].is_open:
                self._tensor(self._matrix(name))

    def key(self, file: str) -> str:
        """The manifest's key of what `file` is made from (see `source_key`)."""
        pieces: dict[int, dict[str, None]] = {}
        specs = self.files[file]
        for name in sorted(specs):
            for index, theirs in self._origins(name):
                pieces.setdefault(index, {})[theirs] = None
        identities = [self._pieces[index].identity([*theirs]) for index, theirs in sorted(pieces.items())]
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
        return {index for file in files for name in self.files[file] for index, _ in self._origins(name)}

    def _matrix(self, name: str) -> str:
        """The tensor of the source, by our name, that `name` is made of, or is the scales of."""
        return self._specs[name].made_of or name.removesuffix(SCALE)

    def _origins(self, name: str) -> list[tuple[int, str]]:
        """What the tensor `name` is made from: pieces, and names there."""
        matrix = self._matrix(name)
        return [self._tensors[matrix], *([self._scales[matrix]] if matrix in self._scales else [])]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows, some at a time, in its dtype in `files`, contiguous.

        What is int8 in the source, with scales, is multiplied with them where another dtype is wanted; and what is
        wanted in int8 is quantized, where it is not int8 already.

        Raises:
            CheckpointError: if the tensor is missing, has another shape or no floating-point dtype, or has values
                that are not finite after the cast.
        """
        matrix = self._tensor(self._matrix(name))
        stored = matrix.dtype in _INTEGERS and not self._changing(name)
        if name.endswith(SCALE):
            if stored:
                yield self._scale(name, len(matrix))
            else:
                yield from (scales(rows) for rows in self._cast(name, matrix, torch.float32, _QUANTIZING_BYTES))
        elif self._specs[name].dtype != "int8":
            yield from self._cast(name, matrix, to_torch(self._specs[name].dtype))
        elif stored:
            yield from map(signed, _some_rows(matrix, 1))
        else:
            yield from (quantize(rows) for rows in self._cast(name, matrix, torch.float32, _QUANTIZING_BYTES))

    def _changing(self, name: str) -> list[Adapter]:
        """The adapters that change the matrix that `name` is, or is of."""
        return [adapter for adapter in self._adapters if adapter.changes(self._matrix(name))]

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype, item_bytes: int = 0) -> Iterator[Tensor]:
        """The rows of `tensor` in `dtype`, some at a time, with scales and adapters applied; errors as of `chunks`."""
        adders = [adapter.adder(self._matrix(name)) for adapter in self._changing(name)]
        scale = self._scale(name, len(tensor)) if tensor.dtype in _INTEGERS else None
        if adders or scale is not None:  # there are two copies then: in float32, and what it is cast to
            item_bytes = max(item_bytes, torch.float32.itemsize + dtype.itemsize)
        start = 0
        for rows in _some_rows(tensor, item_bytes or dtype.itemsize):
            try:
                if scale is not None:
                    rows = signed(rows) * scale[start : start + len(rows)]
                if adders:
                    rows = rows.to("cpu", torch.float32, copy=True)
                    for add in adders:
                        add(rows, start)
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

    def _scale(self, name: str, rows: int) -> Tensor:
        """The scales of the int8 matrix that `name` is, or is of: float32 `(rows, 1)`."""
        matrix = self._matrix(name)
        scale = self._read(name, self._scales[matrix])
        if scale.numel() != rows or not scale.is_floating_point() or not (scale > 0).all() or scale.isinf().any():
            raise CheckpointError(
                f"{self.origin}: the scales of {matrix} are {scale.dtype} {tuple(scale.shape)}, or not all "
                f"positive and finite: {rows} are needed, one for each output channel."
            )
        return scale.to("cpu", torch.float32).reshape(rows, 1).contiguous()

    def _read(self, name: str, origin: tuple[int, str]) -> Tensor:
        index, theirs = origin
        try:
            return self._pieces[index].read(theirs)
        except KeyError as error:
            raise CheckpointError(f"{self.origin} lacks the tensor {name}, which its index names.") from error
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.origin}: {name} cannot be read ({error}).") from error

    def _tensor(self, name: str) -> Tensor:
        tensor, shape = self._read(name, self._tensors[name]), self._specs[name].shape
        if is_packed := self._tensors[name][1].endswith(PACKED):
            tensor = self._unpacked(name, tensor, shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {shape}."
            )
        is_int8 = (tensor.dtype == torch.int8 or is_packed) and name in self._scales
        if not tensor.is_floating_point() and not is_int8:
            raise CheckpointError(f"{self.origin}: {name} has dtype {tensor.dtype}, not a floating-point dtype.")
        if tensor.is_meta:
            raise CheckpointError(f"{self.origin}: {name} has no data: it is on the meta device.")
        return tensor

    def _unpacked(self, name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        expected = (shape[0], -(-shape[1] // 4)) if len(shape) == 2 else None
        if tuple(packed.shape) != expected or packed.dtype != torch.int32:
            raise CheckpointError(
                f"{self.origin}: {name}{PACKED} is {packed.dtype} {tuple(packed.shape)}, but config.json makes it "
                f"torch.int32 {expected}."
            )
        return unpack(packed, shape[1])


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


def _some_rows(tensor: Tensor, itemsize: int) -> Sequence[Tensor]:
    """The tensor's rows, some megabytes at a time in elements of so many bytes."""
    row_bytes = max(1, tensor[0].numel() * max(tensor.element_size(), itemsize))
    return tensor.split(max(1, CHUNK_BYTES // row_bytes))


def _split_name(name: str) -> tuple[str, str]:
    """The matrix that `name` belongs to, and what `name` says of it; `name` and "" if it is no part of one."""
    suffix = next((suffix for suffix in (SCALE, PACKED, SHAPE) if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix
