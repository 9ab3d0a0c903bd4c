"""One encoder a feature type: a column, or one value, as numbers of a fixed width. numpy and pyarrow only, JSON-serialisable.

R rows, F numbers of a feature
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from limaml.config import FeatureConfig
from limaml.schema import add_type

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

UNKNOWN = 0
_PIECE_ROWS = 8192
_LEAST_VARIANCE = 1e-16
_SCALES = {"count": "log", "days_since": "log", "rate": "logit"}


class ColumnEncoder(Protocol):
    """How one feature is encoded; a null is unknown, which no known value is."""

    @classmethod
    def fit(cls, feature: FeatureConfig, column: pa.ChunkedArray) -> Self:
        """With what is to be learnt from the values of the training rows."""
        ...

    @property
    def width(self) -> int: ...

    def encode(self, column: pa.Array, out_RF: Floats) -> None:
        """Put a column's rows into `out_RF`, which is zero."""
        ...

    def encode_one(self, value: Any, out_F: list[float], at: int) -> None:
        """As `encode` of one value, into `out_F` from place `at` on."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON values that make it again."""
        ...


@dataclass(frozen=True)
class NumberEncoder:
    """A standardised number and whether it is known."""

    scale: str
    """plain, log (of one more: counts) or logit (rates)."""
    mean: float
    std: float
    width: ClassVar[int] = 2

    @classmethod
    def fit(cls, feature: FeatureConfig, column: pa.ChunkedArray) -> Self:
        scale = _SCALES.get(feature.aggregate or "", "plain")
        numbers, known = _known(column.combine_chunks())
        scaled = _scaled(scale, numbers)[known]
        if not len(scaled):
            return cls(scale, 0.0, 1.0)
        std = float(scaled.std())
        # A constant column carries nothing; dividing by 1 keeps it at zero.
        return cls(scale, float(scaled.mean()), std if std > 1e-8 else 1.0)

    def encode(self, column: pa.Array, out_RF: Floats) -> None:
        numbers, known = _known(column)
        out_RF[:, 0] = np.where(known, (_scaled(self.scale, numbers) - self.mean) / self.std, 0.0)
        out_RF[:, 1] = known

    def encode_one(self, value: Any, out_F: list[float], at: int) -> None:
        if value is not None and math.isfinite(value):
            out_F[at] = (_scaled_one(self.scale, value) - self.mean) / self.std
            out_F[at + 1] = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CategoryEncoder:
    """One place a category; none is set for an unknown one. Sets of categories set several."""

    values: tuple[str, ...]

    @classmethod
    def fit(cls, feature: FeatureConfig, column: pa.ChunkedArray) -> Self:
        return cls(feature.values or distinct(pc.list_flatten(column) if _is_list(column.type) else column))

    @property
    def width(self) -> int:
        return len(self.values)

    @cached_property
    def index(self) -> dict[str, int]:
        """Category -> its number from 1 on."""
        return index_of(self.values)

    def encode(self, column: pa.Array, out_RF: Floats) -> None:
        if _is_list(column.type):
            row_N, column = pc.list_parent_indices(column).to_numpy(zero_copy_only=False), pc.list_flatten(column)
        else:
            row_N = np.arange(len(column))
        index_N = look_up(column, self.index)
        if (index_N == UNKNOWN).any():
            row_N, index_N = row_N[index_N != UNKNOWN], index_N[index_N != UNKNOWN]
        out_RF[row_N, index_N - 1] = 1.0

    def encode_one(self, value: Any, out_F: list[float], at: int) -> None:
        for one in (value or ()) if not isinstance(value, str) else (value,):
            index = self.index.get(one, UNKNOWN)
            if index != UNKNOWN:
                out_F[at + index - 1] = 1.0

    def num_unknown(self, given: Any) -> int:
        """Values, of one or of several, that are none of those seen; what is not there is none."""
        values = (given,) if isinstance(given, str) else given or ()
        return sum(value is not None and value not in self.index for value in values)

    def to_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}


@dataclass(frozen=True)
class CycleEncoder:
    """Sine and cosine of the angle, and whether it is known."""

    period: int
    width: ClassVar[int] = 3

    @classmethod
    def fit(cls, feature: FeatureConfig, column: pa.ChunkedArray) -> Self:  # noqa: ARG003  nothing of it is learnt
        return cls(feature.num_steps)

    @cached_property
    def _table(self) -> Floats:
        """(period, 3): the same bits for a column and for one value, without a sine a row."""
        angle = np.arange(self.period, dtype=np.float64) * (2 * math.pi / self.period)
        return np.stack([np.sin(angle), np.cos(angle), np.ones_like(angle)], axis=1).astype(np.float32)

    def encode(self, column: pa.Array, out_RF: Floats) -> None:
        numbers, known = _known(column)
        out_RF[known] = self._table[numbers[known].astype(np.int64) % self.period]

    def encode_one(self, value: Any, out_F: list[float], at: int) -> None:
        if value is not None:
            out_F[at : at + 3] = self._table[int(value) % self.period].tolist()

    def to_dict(self) -> dict[str, Any]:
        return {"period": self.period}


@dataclass(frozen=True)
class VectorEncoder:
    """A vector less the training items' mean, in units of their root mean square distance from it a number; and whether it is
    known. One unit for all numbers: angles and distances between vectors keep their proportions.

    With `project_to` its first principal components instead, each in units of its own shrunk standard deviation (whitening:
    Kessy, Lewin and Strimmer 2018, section 3; for text as items: Zhang et al. 2024, arXiv 2402.10602). With `norm = "length"`
    each of those is scaled to a mean square of 1.
    """

    mean: tuple[float, ...]
    unit: float
    projection: tuple[tuple[float, ...], ...] = ()
    """Of each component, what every number of the vector counts for; none: the vector itself."""
    norm: str = "none"

    @classmethod
    def fit(cls, feature: FeatureConfig, column: pa.ChunkedArray) -> Self:
        """From one vector an item; nulls say nothing."""
        assert feature.width is not None
        numbers, known = vector_values(column)
        if not known.any():
            identity = np.eye(feature.width)[: feature.project_to or 0]
            return cls((0.0,) * feature.width, 1.0, _rows(identity), feature.norm)
        numbers = numbers[known]
        # In float32, a million vectors would sum to three digits.
        mean = numbers.mean(axis=0, dtype=np.float64)
        if feature.project_to is not None:
            whitening = _whitening(numbers, mean, feature.project_to, feature.whitening_shrinkage)
            return cls(tuple(mean.tolist()), 1.0, _rows(whitening), feature.norm)
        square = sum(float(np.square(part - mean).sum()) for part in _pieces(numbers)) / numbers.size
        return cls(tuple(mean.tolist()), math.sqrt(square) if square > _LEAST_VARIANCE else 1.0, norm=feature.norm)

    @property
    def width(self) -> int:
        return len(self.projection or self.mean) + 1

    def encode(self, column: pa.Array, out_RF: Floats) -> None:
        numbers, known = vector_values(column)
        if self.projection:
            out_RF[:, :-1] = (numbers - self._mean) @ self._matrix.T
        else:
            np.subtract(numbers, self._mean, out=out_RF[:, :-1])
            out_RF[:, :-1] /= np.float32(self.unit)
        if self.norm == "length":
            _scale_to_length(out_RF[:, :-1])
        out_RF[~known] = 0.0
        out_RF[:, -1] = known

    def encode_one(self, value: Any, out_F: list[float], at: int) -> None:
        if value is not None:
            numbers = np.array(value, np.float32) - self._mean
            numbers = self._matrix @ numbers if self.projection else numbers / np.float32(self.unit)
            if self.norm == "length":
                _scale_to_length(numbers[None])
            out_F[at : at + self.width] = [*numbers.tolist(), 1.0]

    @cached_property
    def _mean(self) -> Floats:
        return np.array(self.mean, np.float32)

    @cached_property
    def _matrix(self) -> Floats:
        return np.array(self.projection, np.float32)

    def to_dict(self) -> dict[str, Any]:
        # Parts that are not used are left out: an encoder without them is the JSON that it always was.
        used = {"projection": self.projection} if self.projection else {}
        return {"mean": list(self.mean), "unit": self.unit} | used | ({"norm": self.norm} if self.norm != "none" else {})


_ENCODERS: dict[str, type[ColumnEncoder]] = {
    "number": NumberEncoder,
    "category": CategoryEncoder,
    "categories": CategoryEncoder,
    "cycle": CycleEncoder,
    "vector": VectorEncoder,
}


def register(name: str, encoder: type[ColumnEncoder], stored: pa.DataType) -> None:
    """Let a feature have another type, in this process: how it is encoded, and the Arrow type that its values are stored as.

    Raises ConfigError if there is one of that name, or nothing is stored as that.
    """
    add_type(name, stored)
    _ENCODERS[name] = encoder


def fit_column(feature: FeatureConfig, column: pa.ChunkedArray) -> ColumnEncoder:
    """The encoder of a feature, with what it learns from a column's values."""
    encoder: ColumnEncoder = _ENCODERS[feature.type].fit(feature, column)
    return encoder


def column_from_dict(feature: FeatureConfig, values: Mapping[str, Any]) -> ColumnEncoder:
    """Inverse of `to_dict`. Raises TypeError if a part is missing."""
    encoder: ColumnEncoder = _ENCODERS[feature.type](**{name: _tuples(value) for name, value in values.items()})
    return encoder


def distinct(column: pa.ChunkedArray | pa.Array) -> tuple[str, ...]:
    """Values of a column of text, sorted."""
    return tuple(sorted(value for value in pc.unique(column).to_pylist() if value is not None))


def index_of(values: Sequence[str]) -> dict[str, int]:
    """Value -> its place, from 1 on; 0 is unknown."""
    return {value: index for index, value in enumerate(values, start=1)}


def look_up(values: pa.Array, table: Mapping[str, int]) -> Indices:
    """Index of each value, 0 for null and for what the table lacks; costs one dictionary access per distinct value."""
    coded = values.dictionary_encode()
    found = np.array([table.get(value, UNKNOWN) for value in coded.dictionary.to_pylist()] + [UNKNOWN], np.int64)
    codes = coded.indices.fill_null(len(found) - 1) if coded.indices.null_count else coded.indices
    indices: Indices = found.take(codes.to_numpy())
    return indices


def vector_values(column: pa.ChunkedArray | pa.Array) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(R, F) float32 numbers of a column of vectors of one width, 0 where there is none, and whether each is known."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.list_size
    numbers = array.values.slice(array.offset * width, len(array) * width).to_numpy(zero_copy_only=False).reshape(-1, width)
    known = pc.is_valid(array).to_numpy(zero_copy_only=False)
    return (numbers if known.all() else np.where(known[:, None], numbers, np.float32(0.0))), known


def _pieces(numbers: Floats) -> Iterator[Floats]:
    """Its rows, some at a time: a computation in float64 then takes little beside them."""
    return (numbers[start : start + _PIECE_ROWS] for start in range(0, len(numbers), _PIECE_ROWS))


def _scale_to_length(numbers_RF: Floats) -> None:
    """Give every row a mean square of 1, in place; one that is no further from zero than rounding stays."""
    square_R = np.einsum("rf,rf->r", numbers_RF, numbers_RF) / np.float32(numbers_RF.shape[1])
    numbers_RF /= np.sqrt(np.where(square_R > _LEAST_VARIANCE, square_R, np.float32(1.0)))[:, None]


def _whitening(
    numbers: Floats, mean: npt.NDArray[np.float64], num_components: int, shrinkage: float
) -> npt.NDArray[np.float64]:
    """(components, width) what a centred vector is multiplied with; the sign of a component is that of its largest number."""
    scatter = np.zeros((len(mean), len(mean)))
    for part in _pieces(numbers):
        centred = part - mean
        scatter += centred.T @ centred
    variance, axes = np.linalg.eigh(scatter / len(numbers))
    variance, axes = variance[::-1][:num_components], axes[:, ::-1][:, :num_components].T
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    mean_variance = max(float(np.trace(scatter)) / len(numbers) / len(mean), _LEAST_VARIANCE)
    shrunk = (1.0 - shrinkage) * variance.clip(min=0.0) + shrinkage * mean_variance
    found: npt.NDArray[np.float64] = axes / np.sqrt(shrunk.clip(min=_LEAST_VARIANCE))[:, None]
    return found


def _tuples(value: Any) -> Any:
    """What JSON holds as lists."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _rows(matrix: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind))


def _known(column: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Numbers, 0 where there is none, and whether each is known; a null or a NaN is not."""
    numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = np.isfinite(numbers)
    return (numbers if known.all() else np.where(known, numbers, 0.0)), known


def _scaled(scale: str, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if scale == "log":
        return np.log1p(np.maximum(numbers, 0.0))
    if scale == "logit":
        inside = np.clip(numbers, 1e-3, 1 - 1e-3)
        return np.log(inside / (1 - inside))
    return numbers


def _scaled_one(scale: str, number: float) -> float:
    """As `_scaled` of one number."""
    if scale == "log":
        return math.log1p(max(number, 0.0))
    if scale == "logit":
        inside = min(max(number, 1e-3), 1 - 1e-3)
        return math.log(inside / (1 - inside))
    return number
