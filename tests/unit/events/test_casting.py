"""Which value of a column cannot have the type it should."""

import pyarrow as pa
import pytest

from limaml.events.casting import first_misfit


@pytest.mark.parametrize(
    ("values", "wanted", "row"),
    [
        (pa.array([1.0, None, 2.0, 2.5, 3.5]), pa.int8(), 3),
        (pa.array([None, "9.5", "x"]), pa.float64(), 1),
        (pa.array([1.0, 2.0]), pa.int8(), None),
        (pa.array([None, None], pa.string()), pa.float64(), None),
        (pa.array([[1.0, 2.0], [1.0]]), pa.list_(pa.float32(), 2), 1),
    ],
)
def test_the_first_value_that_cannot_have_the_type(values: pa.Array, wanted: pa.DataType, row: int | None) -> None:
    assert first_misfit(pa.chunked_array([values]), wanted) == row
