"""From a table to a configuration: what is guessed and why, what is asked, and that what is written can be checked."""

import random
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limaml import config
from limaml.errors import ConfigError
from limaml.events.check import check
from limaml.local.init import Answers, init

TODAY = date(2026, 11, 1)
START = datetime(2026, 9, 1, tzinfo=UTC)


def purchases(num_days=12, rows=40, seed=0):
    drawn = random.Random(seed)
    return [
        {
            "customer_no": 1000 + drawn.randrange(60),
            "sku": drawn.randrange(30),
            "bought_at": START + timedelta(days=day, minutes=drawn.randrange(1440)),
            "stars": drawn.randrange(2, 11) / 2,
            "clicked": drawn.random() < 0.3,
            "price": drawn.random() * 50,
        }
        for day in range(num_days)
        for _ in range(rows)
    ]


@pytest.fixture
def shop(tmp_path):
    """Clicks, and a table of items with a column of every kind."""
    pq.write_table(pa.Table.from_pylist(purchases()), tmp_path / "events.parquet")
    numbers = list(range(30))
    items = {
        "SKU": numbers,
        "Product Name": [f"thing {n}" for n in numbers],
        "brand": [f"b{n % 5}" for n in numbers],
        "listPrice": [n * 1.5 for n in numbers],
        "tags": [["new", "sale"][: n % 3] for n in numbers],
        "group_id": [n % 4 for n in numbers],
        "is_new": [n % 2 == 0 for n in numbers],
        "since": [date(2020, 1, 1 + n % 20) for n in numbers],
        "note": [f"note {n} of many" for n in numbers],
        "same": ["x"] * 30,
    }
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    return tmp_path


def run(folder, answers=None, events="events.parquet", items="items.parquet", ask=None):
    out = folder / "limaml.toml"
    init(str(folder / events), "", str(folder / items) if items else "", out, answers or Answers(), ask)
    return config.load(out)


def test_a_plain_table_needs_no_answer(shop, capsys):
    cfg = run(shop)
    columns = cfg.source.columns
    assert (columns.user_id, columns.item_id, columns.timestamp, columns.label) == (
        "customer_no",
        "sku",
        "bought_at",
        "clicked",
    )
    assert cfg.source.item_columns.item_id == "SKU"
    assert (cfg.source.timezone, cfg.source.negatives) == ("", None)
    printed = capsys.readouterr().out
    assert (
        "item_id = 'sku': 100% of its values are in SKU of items_sample; BIGINT, 30 distinct, 0 null of 480, 0 to 29" in printed
    )
    assert "label = 'clicked': its only values are true and false; BOOLEAN, 2 distinct, 0 null" in printed
    assert "event price: number: a number of what happened, for means; DOUBLE" in printed


def test_features_have_their_types_and_what_makes_none_is_said(shop, capsys):
    cfg = run(shop)
    declared = {f.name: (f.type, f.source_column) for f in cfg.features if f.entity == "item" and not f.aggregate}
    assert declared == {
        "product_name": ("text", "Product Name"),
        "brand": ("category", "brand"),
        "listprice": ("number", "listPrice"),
        "tags": ("categories", "tags"),
        "group_id": ("category", "group_id"),
        "is_new": ("category", "is_new"),
    }
    rest = {f.name: (f.entity, f.aggregate, f.by or f.of) for f in cfg.features if f.entity != "item" and not f.clock}
    assert rest == {
        "stars": ("event", None, ""),
        "price": ("event", None, ""),
        "user_events": ("user", "count", ""),
        "user_positive_rate": ("user", "rate", ""),
        "user_item_events": ("user", "count", "item_id"),
        "user_brand_rate": ("user", "rate", "brand"),
        "user_group_id_rate": ("user", "rate", "group_id"),
        "user_is_new_rate": ("user", "rate", "is_new"),
        "user_mean_stars": ("user", "mean", "stars"),
        "user_mean_price": ("user", "mean", "price"),
    }
    printed = capsys.readouterr().out
    for column, reason in (
        ("since", "its type makes no feature"),
        ("note", "nearly every text is another one"),
        ("same", "it always says the same"),
    ):
        assert f"item {column}: left out: {reason}" in printed


def test_what_is_written_passes_its_own_check(shop):
    report = check(run(shop), TODAY)
    assert (report.wrong, report.odd, report.days, report.rows, report.items) == ([], [], 12, 480, 30)
    assert report.ignored == ["items: note, same, since"]


def test_without_a_terminal_every_unsure_guess_names_its_flag(shop):
    rows = [
        {"wer": row["customer_no"], "was": row["sku"], "wann": row["bought_at"].replace(tzinfo=None), "Note": row["stars"]}
        for row in purchases()
    ]
    pq.write_table(pa.Table.from_pylist(rows), shop / "events.parquet")
    with pytest.raises(ConfigError) as caught:
        run(shop, items="")
    message = str(caught.value)
    for flag in ("--user-id (guess 'wer'", "--item-id (guess", "--label (guess '\"Note\" >= 4'", "--timezone (guess 'UTC'"):
        assert flag in message
    assert "--timestamp" not in message
    assert not (shop / "limaml.toml").exists()
    answers = Answers(user_id="wer", item_id="was", label="Note >= 4", timezone="Europe/Berlin")
    cfg = run(shop, answers, items="")
    assert (cfg.source.columns.label, cfg.source.timezone) == ("Note >= 4", "Europe/Berlin")
    assert check(cfg, TODAY).wrong == []


def test_on_a_terminal_it_asks(shop):
    rows = [{k: v for k, v in row.items() if k != "clicked"} for row in purchases()]
    pq.write_table(pa.Table.from_pylist(rows), shop / "events.parquet")
    asked = []
    cfg = run(shop, ask=lambda what, guess: asked.append((what, guess)) or "stars > 3")
    assert cfg.source.columns.label == "stars > 3"
    # Three quarters of the way from 1 to 5.
    assert asked == [("label", "stars >= 4")]


def test_a_table_of_what_happened_gets_sampled_rows(shop):
    rows = [{k: v for k, v in row.items() if k not in ("clicked", "stars")} for row in purchases()]
    pq.write_table(pa.Table.from_pylist(rows), shop / "events.parquet")
    cfg = run(shop, Answers(label="none"))
    assert (cfg.source.columns.label, cfg.source.negatives.per_positive) == ("", 4)
    report = check(cfg, TODAY)
    assert (report.wrong, report.rows) == ([], 5 * 480)


def test_decimal_commas_and_seconds_are_seen(shop):
    lines = ["customer_no;sku;ts;stars;clicked"]
    for row in purchases():
        seconds, stars = int(row["bought_at"].timestamp()), f"{row['stars']:.1f}".replace(".", ",")
        lines.append(f"{row['customer_no']};{row['sku']};{seconds};{stars};{int(row['clicked'])}")
    (shop / "events.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    cfg = run(shop, events="events.csv")
    assert (cfg.source.decimal, cfg.source.columns.timestamp, cfg.source.columns.label) == (",", "ts", "clicked")
    assert check(cfg, TODAY).days == 12


def rows_of(num_numbers):
    """Three numbers an item, of which the last item may have another number of them."""
    return [[n / 4, -1.0, n * 1e-3] for n in range(29)] + [[0.5] * num_numbers]


@pytest.mark.parametrize(
    "meaning",
    [
        pa.array(rows_of(3), pa.list_(pa.float64())),
        pa.array(rows_of(3), pa.list_(pa.float32(), 3)),
        pa.array([[n, n + 1, 0] for n in range(29)] + [None], pa.list_(pa.int32())),
        pa.array([str(row) for row in rows_of(3)]),
    ],
    ids=["doubles", "fixed size", "whole numbers", "text"],
)
def test_lists_of_numbers_of_one_width_are_a_vector_whose_encoder_only_its_owner_knows(shop, capsys, meaning):
    items = pq.read_table(shop / "items.parquet").append_column("meaning", meaning)
    pq.write_table(items, shop / "items.parquet")
    cfg = run(shop)
    [vector] = [feature for feature in cfg.features if feature.type == "vector"]
    assert (vector.name, vector.entity, vector.width) == ("meaning", "item", 3)
    assert (vector.encoder, vector.licence) == ("unknown", "unknown")
    assert "item meaning: vector: each value is 3 numbers; say what made them" in capsys.readouterr().out
    written = (shop / "limaml.toml").read_text().splitlines()
    for name in ("encoder", "licence"):
        assert any(line.startswith(f'{name} = "unknown"  # correct it: ') for line in written)
    report = check(cfg, TODAY)
    assert report.wrong == []
    said = [line.split(" must say ")[0] for line in report.not_permitted]
    assert said == ["source.licence", "features.meaning.licence"]
    assert "Refused when a model is trained:" in report.lines()


@pytest.mark.parametrize(
    "meaning",
    [
        pa.array(rows_of(4), pa.list_(pa.float64())),
        pa.array([str(row) for row in rows_of(2)]),
        pa.array([str(row) for row in rows_of(3)[:-1]] + ["none"]),
        pa.array([[n / 2] for n in range(30)], pa.list_(pa.float64())),
    ],
    ids=["widths", "widths of text", "not every text", "one number"],
)
def test_lists_that_are_no_vector_are_left_out(shop, meaning):
    items = pq.read_table(shop / "items.parquet").append_column("meaning", meaning)
    pq.write_table(items, shop / "items.parquet")
    assert "meaning" not in {feature.name for feature in run(shop).features}


def test_a_column_that_numbers_the_rows_is_no_number_of_what_happened(shop, capsys):
    rows = [row | {"receipt": n} for n, row in enumerate(purchases())]
    pq.write_table(pa.Table.from_pylist(rows), shop / "events.parquet")
    assert "receipt" not in {feature.name for feature in run(shop).features}
    assert "event receipt: left out: it numbers the rows; BIGINT, 480 distinct" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_overwritten(shop):
    (shop / "limaml.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out must name a new file, got .*limaml\.toml, which is there"):
        run(shop)
    assert (shop / "limaml.toml").read_text() == "mine"


def test_names_with_odd_characters_are_declared_and_read(shop):
    items = {
        "item id": list(range(30)),
        "hour": ["a", "b", "c"] * 10,
        "Größe (cm)": [n * 1.0 for n in range(30)],
        "2nd": ["x", "y"] * 15,
    }
    pq.write_table(pa.table(items), shop / "items.parquet")
    cfg = run(shop)
    declared = {f.name: f.source_column for f in cfg.features if f.entity == "item" and not f.aggregate}
    assert declared == {"item_hour": "hour", "gr_e_cm": "Größe (cm)", "item_2nd": "2nd"}
    report = check(cfg, TODAY)
    assert (report.wrong, report.ignored) == ([], [])


def test_a_category_of_events_is_offered_not_declared(shop):
    rows = [row | {"device": "phone" if n % 3 else "desk"} for n, row in enumerate(purchases())]
    pq.write_table(pa.Table.from_pylist(rows), shop / "events.parquet")
    cfg = run(shop)
    assert "device" not in {feature.name for feature in cfg.features}
    written = (shop / "limaml.toml").read_text()
    offered = '# [[features]]\n# entity = "context"\n# name = "device"\n# type = "category"\n'
    assert offered in written
    (shop / "limaml.toml").write_text(written.replace(offered, offered.replace("# ", "")))
    report = check(config.load(shop / "limaml.toml"), TODAY)
    assert (report.wrong, report.ignored) == ([], ["items: note, same, since"])
