"""The CPU target's kernels, as the rank program calls them. They are C++ (`csrc/`), built with the package."""

from __future__ import annotations

import os
from array import array
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import logging

from ...model.arithmetic import LAYER_NORM_EPS, Arithmetic, LayerNorm
from ...model.attention import MASKED
from ..base import TargetError
from .coded import CodedCopies
from .int8_copy import Screen
from .native import _kernels


logger = logging.get_logger(__name__)

# Names the variant to use instead of the best one, one of `variants()`.
VARIANT_VARIABLE = "OPTIMUM_OPT_TRN_KERNELS"

# As in csrc/kernels.h.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

# Variants that gain by factors that are rounded to bfloat16.
_ROUNDING = ("avx512_amx", "avx512_bf16")

# The calls that can be replayed, by their numbers.
CALLS: tuple[str, ...] = () if _kernels is None else _kernels.CALLS
# With more rows, a layernorm before products is a call of its own.
MOST_NORMED_ROWS: int = 0 if _kernels is None else _kernels.MOST_NORMED_ROWS
# With more rows, a screen saves no time.
MOST_SCREENED_ROWS: int = 0 if _kernels is None else _kernels.MOST_SCREENED_ROWS

# Calls whose inputs a late thread may still read (csrc/pool.h), and these inputs.
_kept: deque[tuple[int, object]] = deque()


def variants() -> tuple[str, ...]:
    """The instruction sets that this processor and this build have, the best first.

    Of `avx512_amx`, `avx512_bf16`, `avx512_vnni`, `avx512`, `avx2` and `neon`; each of the first four can do what
    follows it.
    """
    return () if _kernels is None else _kernels.VARIANTS


def why_missing() -> str:
    """Why `variants()` is empty, and the way out."""
    if _kernels is None:
        return "were not built with the package: install g++ and the headers of Python, then install the package again"
    return "need AVX2, FMA and F16C on x86-64, which this processor does not have"


def chosen_variant() -> str | None:
    """The variant to use: the best, or the one that the environment names; None, with one warning, if there is none.

    Raises:
        TargetError: if the environment names one that is not there.
    """
    available, named = variants(), os.environ.get(VARIANT_VARIABLE, "")
    if named and named not in available:
        raise TargetError(
            f"{VARIANT_VARIABLE}={named}: this processor and build have {', '.join(available) or 'none'}. Unset it."
        )
    if not available:
        logger.warning_once(
            f"Models run eagerly on this CPU, correct and many times slower: the kernels {why_missing()}."
        )
        return None
    return named or available[0]


def _best_variant() -> str:
    variant = chosen_variant()
    if variant is None:
        raise TargetError("There are no kernels for this CPU.")
    return variant


@dataclass(frozen=True)
class KernelArithmetic(Arithmetic):
    """Products that read 16-bit and int8 weights as they are, once; sums are float32.

    `torch.get_num_threads()` threads of the kernels' own share the work. Calls of several Python threads take turns.

    Args:
        variant: one of `variants()`; by default what `chosen_variant` returns.
        skip_zeros: whether weights of units that are 0 in every row are left unread: where they are stored by unit,
            and where a screen tells which they are. Results are the same to the bit.
        least_integer_rows: with fewer, int8 weights by output are multiplied in float32 by every variant; by default
            what is fastest on this processor.
        coded: the copies of bfloat16 weights that few rows read instead. By output, results are the same to the bit
            with vectors of AVX-512; by unit with all.
    """

    variant: str = field(default_factory=_best_variant)
    skip_zeros: bool = True
    least_integer_rows: int = field(default_factory=lambda: _kernels.LEAST_INTEGER_ROWS)
    coded: CodedCopies = field(default_factory=CodedCopies, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = variants().index(self.variant)
        object.__setattr__(self, "_index", index)

    _index: int = field(init=False, repr=False, compare=False)

    def linears(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor] | None = None,
        relu: bool = False,
        norm: LayerNorm | None = None,
        scales: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `Arithmetic.linears`; x contiguous, rows of weights contiguous. Threads share all of it at once.

        The biases of int8 weights are float32.
        """
        if not weights or any(given is not None and len(given) != len(weights) for given in (biases, scales)):
            raise RuntimeError(f"{len(weights)} weights, {len(biases or ())} biases, {len(scales or ())} scales")
        k, dtype = _check_x(x), weights[0].dtype
        m = x.numel() // k
        if norm is not None and m > MOST_NORMED_ROWS:
            x, norm = self.layer_norm(x, norm), None
        coded = self._coded(weights)
        ys: list[Tensor] = []
        arguments: list[int] = []
        for i, weight in enumerate(weights):
            n, ldw = _check_weight(weight, k, dtype)
            bias = 0 if biases is None else _check_bias(biases[i], dtype, n)
            scale = _check_scale(None if scales is None else scales[i], dtype, n)
            y = self._empty(*x.shape[:-1], n)
            ys.append(y)
            arguments += weight.data_ptr(), n, ldw, scale, bias, y.data_ptr(), coded[i]
        if m:
            self._compute(
                "linears",
                (x, weights, biases, scales, self.coded),
                *(_DTYPES[dtype], self.rounds_factors(), self.least_integer_rows, m, k, x.data_ptr(), relu),
                *(norm is not None, *_norm_arguments(norm)),
                *arguments,
            )
        return ys

    def screened(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, screen: Screen, norm: LayerNorm | None
    ) -> list[Tensor]:
        """The same as `linears` with `relu`, to the bit; few rows read the copies in `screen` first.

        Args:
            weights: floating point, those that the copies are of.
        """
        k, dtype = _check_x(x), weights[0].dtype
        m = x.numel() // k
        if not 0 < m <= MOST_SCREENED_ROWS or not self.skip_zeros:
            return KernelArithmetic.linears(self, x, weights, biases, True, norm)
        coded = self._coded(weights)
        ys: list[Tensor] = []
        outputs: list[int] = []
        copies: list[int] = []
        for i, (weight, copy, error) in enumerate(zip(weights, screen.copies, screen.errors, strict=True)):
            n, ldw = _check_weight(weight, k, dtype)
            if len(copy.weight) != n or error.shape != (n,) or error.dtype != torch.float32:
                raise RuntimeError(f"the copy of a weight is not of {n} outputs")
            ys.append(self._empty(*x.shape[:-1], n))
            outputs += weight.data_ptr(), n, ldw, 0, 0 if biases is None else _check_bias(biases[i], dtype, n)
            outputs += ys[-1].data_ptr(), coded[i]
            _, ldw = _check_weight(copy.weight, k, torch.int8)
            copies += copy.weight.data_ptr(), ldw, _check_scale(copy.scale, torch.int8, n), error.data_ptr()
        self._compute(
            "screened",
            (x, weights, biases, screen, self.coded),
            *(_DTYPES[dtype], self.rounds_factors(), self.least_integer_rows, m, k, x.data_ptr()),
            *(norm is not None, *_norm_arguments(norm), screen.without.data_ptr(), len(weights)),
            *outputs,
            *copies,
        )
        return ys

    def linear_sum(
        self,
        xs: list[Tensor],
        weights: list[Tensor],
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """See `Arithmetic.linear_sum`; xs and residual contiguous. The bias of int8 weights is float32.

        Either rows of all weights are contiguous, or columns of all are: those are stored by unit, and have to be
        finite, as units that are 0 in x are not read. So have those with coded copies by unit.
        """
        if not weights or len(xs) != len(weights):
            raise RuntimeError(f"{len(xs)} xs and {len(weights)} weights")
        dtype, by_unit = weights[0].dtype, weights[0].stride(-1) != 1 and weights[0].stride(0) == 1
        shape: tuple[int, ...] | None = None
        ks, strides = [], []
        for x, weight in zip(xs, weights, strict=True):
            k = _check_x(x)
            n, ldw = _check_weight(weight, k, dtype, by_unit)
            shape = shape or (*x.shape[:-1], n)
            if (*x.shape[:-1], n) != shape:
                raise RuntimeError(f"the parts of a sum are not all {shape}")
            ks.append(k)
            strides.append(ldw)
        assert shape is not None
        biased = 0 if bias is None else _check_bias(bias, dtype, n)
        scaled = _check_scale(scale, dtype, n)
        if residual is not None and not (
            residual.dtype == torch.float32 and residual.is_contiguous() and residual.shape == shape
        ):
            raise RuntimeError(f"residual is not contiguous float32 {shape}")
        y = self._empty(*shape)
        copies = self.coded.find(weights)
        coded_by_unit = bool(copies) and copies[0].by_unit
        arguments: list[int] = []
        for i, (x, weight, k, ldw) in enumerate(zip(xs, weights, ks, strides, strict=True)):
            coded = copies[i].rows.data_ptr() if copies else 0
            arguments += x.data_ptr(), weight.data_ptr(), k, ldw, coded
        if m := y.numel() // n:
            self._compute(
                "linear_sum",
                (xs, weights, bias, residual, scale, self.coded),
                *(_DTYPES[dtype], self.rounds_factors(), self.least_integer_rows, m, n, by_unit, coded_by_unit),
                *(self.skip_zeros, scaled, biased, 0 if residual is None else residual.data_ptr(), y.data_ptr()),
                *arguments,
            )
        return y

    def rounds_factors(self) -> bool:
        """Whether factors of products may be rounded to bfloat16, and this variant gains by it."""
        return self.variant in _ROUNDING and torch.get_float32_matmul_precision() == "medium"

    def layer_norm(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """See `Arithmetic.layer_norm`; x contiguous."""
        n, y = _check_x(x), self._empty(*x.shape)
        if m := x.numel() // n:
            self._compute("layer_norm", (x,), m, n, x.data_ptr(), y.data_ptr(), *_norm_arguments(norm))
        return y

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        positions: Tensor,
        scale: float,
    ) -> Tensor:
        """Writes each token's key and value to its place in the cache, and attends to its slot up to there.

        Args:
            query, key, value: float32 `(tokens, heads * d)`, contiguous.
            keys, values: `(slots, heads, length, d)`, rows contiguous, with the same strides.
            slots, positions: int64 `(tokens,)`, contiguous; the tokens of a slot are adjacent.
            scale: what scores are multiplied with.

        Returns:
            float32 `(tokens, heads * d)`.

        Raises:
            RuntimeError: if a token is outside the cache.
        """
        held, heads, length, d = keys.shape
        strides, tokens = keys.stride(), len(query)
        if values.shape != keys.shape or values.stride() != strides or values.dtype != keys.dtype or strides[3] != 1:
            raise RuntimeError("keys and values are not alike, or rows of them are not contiguous")
        for x in (query, key, value):
            if x.shape != (tokens, heads * d) or x.dtype != torch.float32 or not x.is_contiguous():
                raise RuntimeError(f"query, key and value are not contiguous float32 {(tokens, heads * d)}")
        for x in (slots, positions):
            if x.shape != (tokens,) or x.dtype != torch.int64 or not x.is_contiguous():
                raise RuntimeError(f"slots and positions are not contiguous int64 {(tokens,)}")
        if length + d > _kernels.SCRATCH:
            raise RuntimeError(f"the cache has {length} positions, of which the kernel takes {_kernels.SCRATCH - d}")
        mixed = self._empty(*query.shape)
        self._compute(
            "attend",
            (query, keys, values),
            *(_DTYPES[keys.dtype], tokens, heads, d),
            *(query.data_ptr(), key.data_ptr(), value.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(slots.data_ptr(), positions.data_ptr(), mixed.data_ptr(), scale, held, length, *strides[:3]),
        )
        return mixed

    def best(self, logits: Tensor, k: int, suppressed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k highest logits of each row, and their tokens; of equal ones the first tokens come first.

        Args:
            logits: float32 `(b, vocabulary)`, rows contiguous. NaN counts as the highest.
            k: how many, at most the vocabulary.
            suppressed: int32 `(b, n)`, tokens whose logits count as `MASKED`; -1 stands for none.

        Returns:
            float32 and int32 `(b, k)`.
        """
        b, n = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1 or not 0 < k <= min(n, _kernels.SCRATCH // 2):
            raise RuntimeError(f"logits {tuple(logits.shape)} {logits.dtype} and {k} best of them")
        masks = 0 if suppressed is None else suppressed.shape[1]
        if suppressed is not None:
            suppressed = suppressed.contiguous()
            if suppressed.dtype != torch.int32 or len(suppressed) != b:
                raise RuntimeError(f"suppressed tokens are not int32 ({b}, n)")
        values, tokens = torch.empty(b, k), torch.empty(b, k, dtype=torch.int32)
        self._compute(
            "best",
            (logits, suppressed),
            *(b, n, logits.stride(0), logits.data_ptr(), masks),
            *(0 if suppressed is None else suppressed.data_ptr(), k, values.data_ptr(), tokens.data_ptr(), MASKED),
        )
        return values, tokens

    def candidates(self, x: Tensor, errors: Tensor, factors: Tensor, most: int) -> list[int] | None:
        """Where the highest of each row may be, if the values of x are not exact.

        Args:
            x: float32 `(m, n)`, contiguous.
            errors: float32 `(n,)`; a value of x is off by at most its error times its row's factor.
            factors: float32 `(m,)`.
            most: of a row.

        Returns:
            The places of all rows, ascending; None if a row has more than `most`.
        """
        m, n = x.shape
        for given, shape in ((x, (m, n)), (errors, (n,)), (factors, (m,))):
            if given.dtype != torch.float32 or not given.is_contiguous() or given.shape != shape:
                raise RuntimeError(f"values, errors or factors are not contiguous float32 {shape}")
        counts, places = torch.empty(m, dtype=torch.int32), torch.empty(m, most, dtype=torch.int32)
        self._compute(
            "candidates",
            (x, errors, factors),
            *(m, n, x.data_ptr(), errors.data_ptr(), factors.data_ptr(), most, counts.data_ptr(), places.data_ptr()),
        )
        found = counts.tolist()
        if (longest := max(found)) > most:
            return None
        rows = places[:, :longest].tolist()
        return sorted({place for row, count in zip(rows, found, strict=True) for place in row[:count]})

    def _coded(self, weights: list[Tensor]) -> list[int]:
        """The addresses of the coded copies by output of weights; 0 for each if one has none."""
        copies = self.coded.find(weights)
        if not copies or copies[0].by_unit:
            return [0] * len(weights)
        return [copy.rows.data_ptr() for copy in copies]

    def _empty(self, *shape: int) -> Tensor:
        """Where a kernel writes its results, float32."""
        return torch.empty(shape)

    def _compute(self, kernel: str, inputs: tuple[object, ...], *arguments: float) -> None:
        """Calls a kernel, whose variant and threads come before `arguments`; `inputs` are kept while it reads them."""
        keep(getattr(_kernels, kernel)(self._index, torch.get_num_threads(), *arguments), inputs)


def _check_x(x: Tensor) -> int:
    if x.dtype != torch.float32 or not x.is_contiguous() or x.dim() == 0:
        raise RuntimeError("x is not contiguous float32 (…, k)")
    return x.shape[-1]


def _check_weight(weight: Tensor, k: int, dtype: torch.dtype, by_unit: bool = False) -> tuple[int, int]:
    """Its outputs, and how far rows (by unit: columns) are apart."""
    if dtype not in _DTYPES:
        raise RuntimeError(f"weight is {dtype}, not float16, bfloat16, float32 or int8")
    if weight.dim() == 2 and weight.dtype == dtype and weight.shape[1] == k:
        n, (row, column) = weight.shape[0], weight.stride()
        if by_unit and (row == 1 or n == 1):
            return n, column
        if not by_unit and (column == 1 or k == 1):
            return n, row
    lines = f"contiguous {'columns' if by_unit else 'rows'}"
    raise RuntimeError(f"weight is not a matrix of {lines} with {k} inputs, {dtype}")


def _check_bias(bias: Tensor, dtype: torch.dtype, n: int) -> int:
    """Its address."""
    dtype = torch.float32 if dtype == torch.int8 else dtype
    if bias.dtype != dtype or not bias.is_contiguous() or bias.numel() != n:
        raise RuntimeError(f"bias is not contiguous {dtype} ({n},)")
    return bias.data_ptr()


def _check_scale(scale: Tensor | None, dtype: torch.dtype, n: int) -> int:
    """Its address, 0 if there is none."""
    if (scale is not None) != (dtype == torch.int8):
        raise RuntimeError(f"weight is {dtype} {'without' if scale is None else 'with'} a scale")
    if scale is None:
        return 0
    if scale.dtype != torch.float32 or not scale.is_contiguous() or scale.shape != (n, 1):
        raise RuntimeError(f"scale is not contiguous float32 ({n}, 1)")
    return scale.data_ptr()


def replay(words: array[int], inputs: object) -> None:
    """Runs calls of the kernels again, as csrc/module.cpp describes them; `inputs` are kept while they read them."""
    for handle in _kernels.replay(*words.buffer_info()):
        keep(handle, inputs)


def _norm_arguments(norm: LayerNorm | None) -> tuple[int, int, float]:
    if norm is None or norm.weight is None or norm.bias is None:
        return 0, 0, LAYER_NORM_EPS
    return norm.weight.data_ptr(), norm.bias.data_ptr(), LAYER_NORM_EPS


def keep(handle: int, inputs: object) -> None:
    """Keeps the inputs of a call until all threads have left it; `handle` is 0 if they have."""
    if handle:
        _kept.append((handle, inputs))
    for _ in range(len(_kept)):
        try:
            entry = _kept.popleft()
        except IndexError:  # another Python thread was here
            return
        if not _kernels.left(entry[0]):
            _kept.append(entry)
