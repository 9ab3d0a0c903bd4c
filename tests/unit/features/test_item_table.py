"""Vectors of items: encoded once, gathered by index, and what a network reads is what copying them to every row would give."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from limaml import schema
from limaml.config import Config, FeatureConfig, TaskKindConfig
from limaml.features.columns import VectorEncoder, column_from_dict, fit_column
from limaml.features.encoder import Encoder
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch
from limaml.tasks.supports import Supports
from limaml.training.scoring import flat_rows

WIDTH = 3
VECTOR = FeatureConfig(entity="item", name="text", type="vector", width=WIDTH, encoder="hashes-1", licence="MIT")
FEATURES = (
    FeatureConfig(entity="item", name="item_events", type="number", aggregate="count"),
    VECTOR,
    FeatureConfig(entity="item", name="tags", type="categories"),
    FeatureConfig(entity="item", name="price", type="number"),
    FeatureConfig(entity="user", name="user_events", type="number", aggregate="count"),
    FeatureConfig(entity="context", name="hour", type="cycle", clock="hour"),
)
CONFIG = Config.model_validate({"features": FEATURES, "source": {"kind": "synthetic"}})
TABLES = schema.tables(FEATURES)
VECTORS = {"i0": [1.0, 2.0, 3.0], "i1": None, "i2": [3.0, 2.0, 1.0], "never shown": [100.0, 0.0, 0.0]}


def vectors(values=VECTORS):
    return pa.table({"item_id": list(values), "text": list(values.values())}, schema=TABLES.item_vectors.arrow)


def logged(num_rows=12, items=("i2", "i0", "i1", "i0")):
    rows = [
        {
            "event_id": f"e{at:02d}",
            "user_id": f"u{at * 7 % 3}",
            "item_id": items[at % len(items)],
            "timestamp": at * 3_600_000_000,
            "label": at % 2,
            "tags": ["a", "b"][: at % 3],
            "price": float(at),
            "item_events": at,
            "user_events": at // 2,
        }
        for at in range(num_rows)
    ]
    return pa.Table.from_pylist(rows, schema=TABLES.logged_events.arrow).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )


@pytest.fixture
def encoder():
    return Encoder.fit(logged(), CONFIG, vectors())


def copied(encoder, table):
    """(R, F) by hand: tags and price, the vector, the count."""
    dense = encoder.encode_table(table).item_dense
    mean, unit = np.array([2.0, 2.0, 2.0]), math.sqrt(4 / 6)
    found = []
    for row, item in enumerate(table["item_id"].to_pylist()):
        vector = VECTORS.get(item)
        numbers = [0.0] * (WIDTH + 1) if vector is None else [*((np.array(vector) - mean) / unit), 1.0]
        found.append([*dense[row, :4], *numbers, *dense[row, 4:]])
    return np.array(found, np.float32)


def test_the_constants_are_those_of_the_training_items(encoder):
    """The mean and the root mean square distance from it of i0 and i2; a null and an item without events have no part."""
    column = encoder.columns["text"]
    assert column.mean == (2.0, 2.0, 2.0)
    assert column.unit == pytest.approx(math.sqrt((1 + 0 + 1 + 1 + 0 + 1) / 6))
    assert column.width == WIDTH + 1


def test_an_encoder_is_json_without_the_table(encoder):
    with_table = encoder.with_items(vectors())
    again = Encoder.from_dict(json.loads(json.dumps(with_table.to_dict())))
    assert again == encoder == with_table
    assert again.item_table is None
    assert np.array_equal(again.with_items(vectors()).item_table.encoded, with_table.item_table.encoded)


def test_the_table_is_encoded_vectors_and_zeros_for_what_is_not_known(encoder):
    table = encoder.with_items(vectors()).item_table
    half = 1 / math.sqrt(4 / 6)
    far = [98 * half, -2 * half, -2 * half, 1.0]
    expected = [[0.0] * 4, [-half, 0.0, half, 1.0], [0.0] * 4, [half, 0.0, -half, 1.0], far]
    assert table.encoded == pytest.approx(np.array(expected), rel=1e-6)
    assert table.encoded.dtype == np.float32
    assert table.rows(pa.array(["i2", None, "new", "i0"])).tolist() == [3, 0, 0, 1]


def test_one_value_is_encoded_as_a_column_is(encoder):
    column = encoder.columns["text"]
    for item, value in VECTORS.items():
        one, row = [0.0] * 6, np.zeros((1, 4), np.float32)
        column.encode_one(value, one, 1)
        column.encode(pa.array([value], schema.arrow_type(VECTOR)), row)
        assert one == [0.0, *row[0].tolist(), 0.0], item


def test_a_slice_of_a_column_is_encoded_as_the_whole(encoder):
    column, whole = encoder.columns["text"], vectors()["text"].combine_chunks()
    expected, found = np.zeros((4, 4), np.float32), np.zeros((2, 4), np.float32)
    column.encode(whole, expected)
    column.encode(whole.slice(1, 2), found)
    assert np.array_equal(found, expected[1:3])


def test_constant_and_missing_vectors_are_no_trouble():
    kind = schema.arrow_type(VECTOR)
    for values, mean in (([[5.0, 5.0, 5.0]] * 2, (5.0,) * 3), ([None], (0.0,) * 3), ([], (0.0,) * 3)):
        assert VectorEncoder.fit(VECTOR, pa.chunked_array([pa.array(values, kind)])) == VectorEncoder(mean, 1.0)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_network_is_given_the_same_numbers_at_any_scale_of_the_vectors(scale):
    """Root mean square 1 over the training items' numbers, whatever unit an encoder's vectors come in."""
    rng, names = np.random.default_rng(0), [f"item{n}" for n in range(50)]
    drawn = {name: (rng.standard_normal(WIDTH) + 0.3).tolist() for name in names}
    scaled = {name: [scale * number for number in vector] for name, vector in drawn.items()}

    def encoded(values):
        column = vectors(values)["text"]
        encoder, numbers = fit_column(VECTOR, column), np.zeros((len(values), WIDTH + 1), np.float32)
        encoder.encode(column.combine_chunks(), numbers)
        return numbers

    assert np.sqrt(np.square(encoded(scaled)[:, :-1]).mean()) == pytest.approx(1.0, abs=1e-5)
    # Numbers near 1 in float32, from a difference of two: 1e-6 is eight units of the last place.
    np.testing.assert_allclose(encoded(scaled), encoded(drawn), rtol=0, atol=1e-6)


def test_the_mean_of_many_vectors_is_exact():
    """100,000 vectors around 1,000: a float32 sum of them is wrong by more than their spread."""
    numbers = np.random.default_rng(0).normal(1000, 0.01, (100_000, 3)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 3)
    fitted = VectorEncoder.fit(VECTOR, pa.chunked_array([column]))
    exact = numbers.astype(np.float64)
    assert fitted.mean == pytest.approx(exact.mean(axis=0), abs=1e-9)
    assert fitted.unit == pytest.approx(math.sqrt(((exact - exact.mean(axis=0)) ** 2).mean()), rel=1e-9)


def test_the_widths_count_the_vectors_as_what_an_item_is(encoder):
    # Two tags, the price and its flag, three numbers and a flag; and the count with its flag.
    assert (encoder.dims.item_sets, encoder.dims.item_static, encoder.dims.item_dense) == (2, 8, 10)
    encoded = encoder.with_items(vectors()).encode_table(logged())
    assert encoded.item_width == 10
    assert encoded.item_dense.shape == (12, 6)


def test_rows_hold_no_vector_and_gather_them(encoder):
    table = logged()
    encoded = encoder.with_items(vectors()).encode_table(table)
    expected = copied(encoder.with_items(vectors()), table)
    assert encoded.item_features() == pytest.approx(expected, rel=1e-6)
    at = np.array([[5, 0], [11, 5]])
    assert np.array_equal(encoded.item_features(at), encoded.item_features()[at])
    assert np.array_equal(encoded.take(at[0]).item_features(), encoded.item_features()[at[0]])
    assert encoded.take(at[0]).item_table is encoded.item_table


def test_every_way_from_rows_to_tensors_gives_the_same_numbers(encoder):
    table, encoder = logged(), encoder.with_items(vectors())
    expected = copied(encoder, table)
    tasks = TaskRows.from_logged(table, encoder, TaskKindConfig(name="user"))
    assert flat_rows(tasks, np.arange(12)).item_dense_TRF[:, 0].numpy() == pytest.approx(expected[tasks.source_row], rel=1e-6)
    spec = TaskSpec(1, 10**12, int(tasks.offsets[1]), int(tasks.offsets[1]) + 2, np.array([int(tasks.offsets[2]) - 1]))
    batch = build_batch(tasks, [spec, TaskSpec(0, 10**12, 0, 1)])
    mine = expected[tasks.source_row]
    assert batch.support.item_dense_TRF[0].numpy() == pytest.approx(mine[spec.support_start : spec.support_stop], rel=1e-6)
    assert batch.query.item_dense_TRF[0].numpy() == pytest.approx(mine[spec.query], rel=1e-6)
    # A padded row is zeros, and its flag too.
    assert not batch.support.item_dense_TRF[1, 1].any()
    supports = Supports.from_sorted(table, encoder, "user_id", 10**12, 4)
    together = Rows.consecutive(supports, 0, 3, 4, 10**12)
    assert together.item_dense_TRF.reshape(12, -1).numpy() == pytest.approx(expected, rel=1e-6)
    assert Rows.from_encoded(encoder.encode_table(table)).item_dense_TRF[0].numpy() == pytest.approx(expected, rel=1e-6)


def test_rows_without_the_table_are_an_error_and_not_zeros(encoder):
    with pytest.raises(ValueError, match="rows of items with vectors must be encoded with them, got none"):
        encoder.encode_table(logged())
    with pytest.raises(ValueError, match="items must hold the declared vectors, got none"):
        encoder.with_items(None)
    with pytest.raises(ValueError, match="items must hold the declared vectors, got none"):
        Encoder.fit(logged(), CONFIG)


def test_without_a_vector_rows_are_the_arrays_they_were():
    cfg = CONFIG.model_copy(update={"features": tuple(feature for feature in FEATURES if feature != VECTOR)})
    encoder = Encoder.fit(logged(), cfg)
    assert encoder.with_items(None) is encoder
    encoded = encoder.encode_table(logged())
    assert encoded.item_row is None
    assert encoded.item_features().base is encoded.item_dense
    assert Rows.from_encoded(encoded).item_dense_TRF.data_ptr() == encoded.item_dense.ctypes.data


@pytest.fixture
def whitened():
    """The encoder of a vector of six numbers, two of which are sums of others, and the vectors that it was fitted on."""
    drawn_NI = np.random.default_rng(0).normal(size=(400, 4)) * [3.0, 1.0, 0.3, 0.02] + [1.0, 0.0, -2.0, 0.0]
    numbers = np.column_stack([drawn_NI, drawn_NI[:, 0] + drawn_NI[:, 1], drawn_NI[:, 1] - drawn_NI[:, 2]]).astype(np.float32)

    def fit(**how):
        feature = VECTOR.model_copy(update={"width": 6} | how)
        column = pa.chunked_array([pa.array([*numbers.tolist(), None], pa.list_(pa.float32(), 6))])
        return fit_column(feature, column), column.combine_chunks()

    return fit


def encoded(encoder, column):
    found = np.zeros((len(column), encoder.width), np.float32)
    encoder.encode(column, found)
    return found


def test_whitened_components_vary_alike_and_apart_from_one_another(whitened):
    encoder, column = whitened(project_to=3, whitening_shrinkage=0.0)
    found = encoded(encoder, column)
    assert found.shape == (401, 4)
    assert np.cov(found[:-1, :3].T, bias=True) == pytest.approx(np.eye(3), abs=1e-3)
    assert found[:-1, :3].mean(axis=0) == pytest.approx(0.0, abs=1e-4)
    assert found[:-1, 3].all()
    assert not found[-1].any(), "a null is all zeros"


def test_shrinkage_leaves_small_what_hardly_varies(whitened):
    """Each variance v becomes v / ((1 - s) v + s m), m the mean of all six."""
    encoder, column = whitened(project_to=4, whitening_shrinkage=0.25)
    plain, _ = whitened()
    numbers = np.array(column.to_pylist()[:-1])
    variance = np.linalg.eigvalsh(np.cov(numbers.T, bias=True))[::-1]
    expected = variance[:4] / (0.75 * variance[:4] + 0.25 * variance.mean())
    assert encoded(encoder, column)[:-1, :4].var(axis=0) == pytest.approx(expected, rel=1e-3)
    assert expected[3] < 0.01 < expected[0]
    assert encoded(plain, column).shape == (401, 7)


def test_one_value_is_projected_as_a_column_is_and_survives_json(whitened):
    encoder, column = whitened(project_to=2)
    again = type(encoder)(**{k: tuple(map(tuple, v)) if k == "projection" else v for k, v in encoder.to_dict().items()})
    assert json.loads(json.dumps(encoder.to_dict()))["projection"] == [list(row) for row in encoder.projection]
    one = [0.0] * 4
    again.encode_one(column[7].as_py(), one, 1)
    assert one[1:] == pytest.approx(encoded(encoder, column)[7].tolist(), rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"project_to": 3, "whitening_shrinkage": 0.25}], ids=["plain", "projected"])
def test_a_norm_gives_every_vector_one_length_and_leaves_its_direction(whitened, how):
    encoder, column = whitened(norm="length", **how)
    plain = encoded(whitened(**how)[0], column)[:-1, :-1]
    found = encoded(encoder, column)
    # Sums of squares of a few numbers in float32.
    assert np.square(found[:-1, :-1]).mean(axis=1) == pytest.approx(1.0, abs=1e-6)
    assert found[:-1, :-1] == pytest.approx(plain / np.sqrt(np.square(plain).mean(axis=1, keepdims=True)), rel=1e-5)
    assert np.square(plain).mean(axis=1).std() > 0.3, "without it lengths differ"
    assert found[:-1, -1].all()
    assert not found[-1].any(), "a null is all zeros"


@pytest.mark.parametrize("how", [{}, {"project_to": 3}], ids=["plain", "projected"])
def test_a_normed_value_is_encoded_as_a_column_is_and_survives_json(whitened, how):
    encoder, column = whitened(norm="length", **how)
    feature = VECTOR.model_copy(update={"width": 6, "norm": "length"} | how)
    again = column_from_dict(feature, json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    one = [0.0] * (encoder.width + 1)
    again.encode_one(column[7].as_py(), one, 1)
    assert one[1:] == pytest.approx(encoded(encoder, column)[7].tolist(), rel=1e-5)


def test_a_vector_that_is_the_mean_has_no_direction_and_stays_zero():
    mean = VectorEncoder((1.0, 2.0, 3.0), 1.0, norm="length")
    found = encoded(mean, pa.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0 + 1e-3]], schema.arrow_type(VECTOR)))
    assert found[0].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert found[1] == pytest.approx([0.0, 0.0, math.sqrt(3), 1.0], abs=1e-6)


def test_an_encoder_without_a_norm_is_the_json_that_it_was_before_there_was_one(whitened):
    for how, names in (({}, {"mean", "unit"}), ({"project_to": 2}, {"mean", "unit", "projection"})):
        encoder, _ = whitened(**how)
        assert encoder.to_dict().keys() == names
        assert column_from_dict(VECTOR, json.loads(json.dumps(encoder.to_dict()))).norm == "none"


def test_a_norm_and_a_dropout_are_of_a_vector():
    price = {"entity": "item", "name": "price", "type": "number"}
    for wrong, value in (({"norm": "length"}, "length and 0"), ({"dropout": 0.2}, "none and 0.2")):
        rule = f"norm and dropout must be of a vector, got {value}; got the number price of item; correct its declaration"
        with pytest.raises(ValueError, match=rule):
            FeatureConfig.model_validate(price | wrong)
    with pytest.raises(ValueError, match="less than 1"):
        FeatureConfig.model_validate(VECTOR.model_dump() | {"dropout": 1.0})


def test_a_projection_is_no_wider_than_its_vector():
    with pytest.raises(
        ValueError, match="project_to must be of a vector and at most its width, 3; got the vector text of item"
    ):
        FeatureConfig.model_validate(VECTOR.model_dump() | {"project_to": 4})
