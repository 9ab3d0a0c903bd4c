"""The encoder: fixed widths, unknown rows, null profiles, JSON, and the same arrays from a table and from a request."""

import json
import math
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml.config import Config, FeatureConfig
from limaml.features.columns import CategoryEncoder, CycleEncoder, NumberEncoder
from limaml.features.encoder import Encoder, EncoderDims
from tests import declared

CONFIG = Config.model_validate({"features": declared.FEATURES, "source": {"kind": "synthetic"}})
PROFILE = {"age_band": "25_34", "gender": "F", "occupation": "artist", "user_events": 3, "user_positive_rate": 0.25}
ITEM = {"year": 1990, "genres": ["drama"], "item_events": 8, "item_positive_rate": 0.75}


def _row(number, **values):
    at = datetime(2026, 1, 1, 6, tzinfo=UTC)
    base = {"event_id": f"e{number}", "user_id": f"u{number}", "item_id": f"i{number}", "timestamp": at, "label": 1}
    return base | PROFILE | ITEM | values


def _table(*rows):
    return pa.Table.from_pylist(list(rows), schema=declared.LOGGED_EVENTS.arrow)


@pytest.fixture
def encoder():
    other = {"age_band": "18_24", "gender": "M", "occupation": "writer", "user_events": 0, "user_positive_rate": 0.75}
    rows = (_row(2), _row(1, **other, year=1970, genres=["comedy", "drama"], item_events=0, item_positive_rate=0.25))
    return Encoder.fit(_table(*rows), CONFIG)


def test_widths_are_those_of_the_arrays(encoder):
    encoded = encoder.encode_table(_table(_row(1), _row(2), _row(3)))
    # 7 age bands, 2 genders, 2 occupations, 2 numbers; 2 genres, 3 numbers, one of them static. A number has a flag beside it.
    assert encoder.dims == EncoderDims(
        num_items=2, num_entities=2, item_dense=8, user_dense=15, context=3, item_static=4, item_sets=2
    )
    assert encoded.item_dense.shape == (3, 8)
    assert encoded.user_dense.shape == (3, 15)
    assert encoded.context.shape == (3, 3)
    assert {array.dtype for array in (encoded.item_dense, encoded.user_dense, encoded.context)} == {np.dtype(np.float32)}


def test_unknown_items_and_entities_have_index_0_and_known_ones_have_not(encoder):
    encoded = encoder.encode({"item_id": ["i2", "new", "i1", None]}, 4)
    assert encoded.item_index.tolist() == [2, 0, 1, 0]
    assert encoder.entity_index(["u1", "new", "u2"]).tolist() == [1, 0, 2]


def test_a_new_item_keeps_its_features(encoder):
    encoded = encoder.encode(ITEM | {"genres": [["drama"]], "item_id": "new"}, 1)
    known = encoder.encode(ITEM | {"genres": [["drama"]], "item_id": "i2"}, 1)
    assert encoded.item_index.tolist() == [0]
    assert np.array_equal(encoded.item_dense, known.item_dense)
    assert encoded.item_dense[0, :2].tolist() == [0.0, 1.0]


def test_a_null_profile_is_all_zeros_and_a_known_one_is_not(encoder):
    nothing = dict.fromkeys((*declared.USER_FEATURE_NAMES, *declared.ITEM_FEATURE_NAMES, "hour"))
    encoded = encoder.encode(nothing, 2)
    for array in (encoded.user_dense, encoded.item_dense, encoded.context):
        assert not array.any()
    assert encoder.encode(PROFILE, 1).user_dense[0, -1] == 1.0


def test_numbers_are_standardised_by_the_training_rows(encoder):
    encoded = encoder.encode_table(_table(_row(1), _row(1, user_events=0, user_positive_rate=0.75)))
    # Two training rows, one of each value: mean between them, one standard deviation to either side.
    assert encoded.user_dense[:, [-4, -2]] == pytest.approx(np.array([[1.0, -1.0], [-1.0, 1.0]]), abs=1e-6)


def test_counts_are_logarithms_and_rates_are_logits():
    """Equal steps of log(1 + n) and of log(p / (1 - p)) are equal steps of the encoded number."""
    rows = [
        _row(n, item_events=events, item_positive_rate=rate) for n, (events, rate) in enumerate([(0, 0.1), (3, 0.5), (15, 0.9)])
    ]
    encoded = Encoder.fit(_table(*rows), CONFIG).encode_table(_table(*rows))
    for number in (3, 5):
        steps = np.diff(encoded.item_dense[:, number])
        assert steps[0] == pytest.approx(steps[1], rel=1e-5)
        assert steps[0] > 0.5


def test_a_missing_number_is_marked(encoder):
    encoded = encoder.encode_table(_table(_row(1, year=None), _row(2)))
    assert encoded.item_dense[:, [3, 5, 7]].tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert encoded.item_dense[0, 2] == 0.0


def test_a_value_outside_the_vocabulary_is_all_zeros_in_its_block_alone(encoder):
    encoded = encoder.encode_table(_table(_row(1, occupation="astronaut", genres=["western"])))
    assert encoded.user_dense[0, 9:11].tolist() == [0.0, 0.0]
    assert encoded.user_dense[0, :9].sum() == 2.0
    assert encoded.item_dense[0, :2].tolist() == [0.0, 0.0]


def test_the_hour_is_an_angle_taken_from_the_timestamp_in_utc(encoder):
    context = encoder.encode_table(_table(_row(1), _row(2, timestamp=datetime(2026, 1, 1, 23, 59, tzinfo=UTC)))).context
    late = 2 * math.pi * 23 / 24
    assert context == pytest.approx(np.array([[1.0, 0.0, 1.0], [math.sin(late), math.cos(late), 1.0]]), abs=1e-6)


def test_a_request_encodes_as_the_table_does(encoder):
    """A server has plain lists, with None, and one value for what holds for all candidates."""
    rows = [_row(1), _row(2, item_id="new", year=None, genres=[], item_events=1)]
    table = encoder.encode_table(_table(*rows))
    lists = {name: [row[name] for row in rows] for name in ("item_id", *declared.ITEM_FEATURE_NAMES)}
    request = encoder.encode({**PROFILE, **lists, "hour": 6}, 2)
    for name in ("item_index", "item_dense", "user_dense", "context"):
        assert np.array_equal(getattr(table, name), getattr(request, name)), name


def test_a_float_column_may_mark_the_unknown_with_nan(encoder):
    encoded = encoder.encode({"item_events": np.array([8.0, np.nan])}, 2)
    assert np.isfinite(encoded.item_dense).all()
    assert np.array_equal(encoded.item_dense[1], encoder.encode({"item_events": [None]}, 1).item_dense[0])


def test_a_column_of_another_length_is_refused(encoder):
    with pytest.raises(ValueError, match="column item_id must hold 3 values, one a row, got 2"):
        encoder.encode({"item_id": ["i1", "i2"]}, 3)


def test_json_gives_an_equal_encoder(encoder):
    again = Encoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    table = _table(_row(1), _row(5, year=None))
    assert np.array_equal(again.encode_table(table).item_dense, encoder.encode_table(table).item_dense)


def test_it_learns_nothing_from_labels_or_row_order():
    rows = [_row(number, year=1950 + number) for number in range(9)]
    flipped = [row | {"label": 0} for row in reversed(rows)]
    assert Encoder.fit(_table(*rows), CONFIG) == Encoder.fit(_table(*flipped), CONFIG)


def test_no_rows_encode_to_no_rows(encoder):
    assert len(encoder.encode_table(_table())) == 0
    assert Encoder.fit(_table(), CONFIG).dims.num_items == 0


def _plain(encoder, row):
    """One row by the definition: plain Python, one number at a time."""

    def standardised(name):
        mean, std = encoder.columns[name].mean, encoder.columns[name].std
        value = row[name]
        if value is None:
            return [0.0, 0.0]
        if name.endswith("_events"):
            value = np.log1p(np.float64(value))
        elif name.endswith("_rate"):
            inside = min(max(float(np.float32(value)), 1e-3), 1 - 1e-3)
            value = np.log(inside / (1 - inside))
        return [(value - mean) / std, 1.0]

    categories = {name: encoder.columns[name].values for name in ("age_band", "gender", "occupation")}
    user = [float(row[name] == value) for name, values in categories.items() for value in values]
    user += [number for name in ("user_events", "user_positive_rate") for number in standardised(name)]
    item = [float(genre in (row["genres"] or [])) for genre in encoder.columns["genres"].values]
    item += [number for name in ("year", "item_events", "item_positive_rate") for number in standardised(name)]
    angle = np.float64(row["timestamp"].hour) * (2 * math.pi / 24)
    item_index = encoder.items.index(row["item_id"]) + 1 if row["item_id"] in encoder.items else 0
    return item_index, item, user, [np.sin(angle), np.cos(angle), 1.0]


def _random_rows(num_rows):
    rng = np.random.default_rng(5)

    def maybe(value):
        return None if rng.random() < 0.2 else value

    return [
        _row(
            int(rng.integers(0, 40)),
            timestamp=datetime(2026, 1, 1, int(rng.integers(0, 24)), tzinfo=UTC),
            age_band=maybe(str(rng.choice(declared.AGE_BANDS))),
            gender=maybe(str(rng.choice(["F", "M", "X"]))),
            occupation=maybe(f"o{rng.integers(0, 6)}"),
            user_events=maybe(int(rng.integers(0, 500))),
            user_positive_rate=maybe(float(rng.random())),
            year=maybe(int(rng.integers(1920, 2026))),
            genres=maybe([f"g{n}" for n in rng.permutation(8)[: rng.integers(0, 4)]]),
            item_events=maybe(int(rng.integers(0, 500))),
            item_positive_rate=maybe(float(rng.choice([0.0, 1.0, rng.random()]))),
        )
        for _ in range(num_rows)
    ]


@pytest.mark.parametrize("form", ["table", "chunks", "coded", "record batch"])
def test_every_form_of_a_table_encodes_to_the_bits_of_the_plain_formula(form):
    rows = _random_rows(300)
    # Learnt from some rows only: items, genres and occupations of the others are unknown.
    encoder = Encoder.fit(_table(*rows[:12]), CONFIG)
    table = _table(*rows)
    if form == "chunks":
        table = pa.concat_tables([table.slice(0, 100), table.slice(100)])
    elif form == "coded":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        coded = ["item_id", "age_band", "gender", "occupation", "genres.list.element"]
        table = pq.read_table(pa.BufferReader(sink.getvalue()), read_dictionary=coded)
        assert pa.types.is_dictionary(table.schema.field("genres").type.value_type)
    elif form == "record batch":
        table = table.to_batches()[0].slice(7)
        rows = rows[7:]
    encoded = encoder.encode_table(table)
    expected = [_plain(encoder, row) for row in rows]
    assert encoded.item_index.tolist() == [index for index, *_ in expected]
    assert 0 in encoded.item_index
    for at, name in enumerate(("item_dense", "user_dense", "context"), start=1):
        assert np.array_equal(getattr(encoded, name), np.array([row[at] for row in expected], np.float32)), name


@pytest.mark.parametrize(
    "user",
    [
        {},
        dict.fromkeys(declared.USER_FEATURE_NAMES),
        {"age_band": "25_34", "gender": "F", "occupation": "artist", "user_events": 40, "user_positive_rate": 0.75},
        {"age_band": "18_24", "gender": "nobody's", "occupation": None, "user_events": 0, "user_positive_rate": 1.0},
        {"age_band": None, "gender": "M", "user_events": None, "user_positive_rate": math.nan},
        {"user_events": -2, "user_positive_rate": 0.0},
    ],
    ids=["nothing", "nulls", "known", "unseen values", "holes", "out of range"],
)
def test_one_user_is_encoded_as_in_a_column(user):
    texts = {"age_band": declared.AGE_BANDS, "gender": ("F", "M"), "occupation": ("artist", "lawyer"), "genres": ("Drama",)}
    columns = {name: CategoryEncoder(values) for name, values in texts.items()} | {"hour": CycleEncoder(24)}
    numbers = {"user_events": "log", "user_positive_rate": "logit", "year": "plain"}
    numbers |= {"item_events": "log", "item_positive_rate": "logit"}
    columns |= {name: NumberEncoder(scale, 0.3, 1.7) for name, scale in numbers.items()}
    encoder = Encoder(declared.FEATURES, ("i1",), ("u1",), columns)
    expected = encoder.encode({**user, "item_id": ["i1"]}, 1).user_dense[0]
    # Both compute in float64 and round once; a vectorised logarithm may differ in its last bit.
    np.testing.assert_allclose(encoder.encode_user(user, datetime(2026, 1, 5, tzinfo=UTC)), expected, rtol=1e-6, atol=0)


def test_a_request_says_its_context_or_the_clock_does(encoder):
    now = datetime(2026, 1, 5, 14, 30, tzinfo=UTC)
    for given, hour in (({}, 14), ({"hour": None}, 14), ({"hour": 0}, 0), ({"hour": 23}, 23)):
        context, encoded = encoder.encode_context(given, now)
        assert context == {"hour": hour}
        assert np.array_equal(encoded, encoder.encode({"hour": hour}, 1).context[0])


def test_the_week_of_a_table_is_the_week_of_a_request():
    """1970-01-01 was a Thursday; 0 is Monday on both sides."""
    features = (FeatureConfig(entity="context", name="day", type="cycle", clock="weekday"),)
    encoder = Encoder.fit(_table(_row(1)), CONFIG.model_copy(update={"features": features}))
    for day in range(1, 15):
        at = datetime(2026, 1, day, 23, 59, tzinfo=UTC)
        context, encoded = encoder.encode_context({}, at)
        assert context == {"day": at.weekday()}
        assert np.array_equal(encoder.encode_table(_table(_row(1, timestamp=at))).context[0], encoded)
    assert encoder.dims == EncoderDims(num_items=1, num_entities=1, item_dense=0, user_dense=0, context=3)
