"""configs/kuairand.toml on a small sample made here, with the columns of the public files: `check`, and all days ingested."""

import csv
import math
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from limaml import config, schema
from limaml.events.check import check
from limaml.events.ingest import ingest_history
from limaml.events.logged import read_logged
from limaml.io.storage import Storage

TODAY = date(2026, 11, 28)
FIRST = date(2022, 4, 24)
NUM_DAYS, USERS, VIDEOS, ROWS_A_DAY = 15, 40, 30, 60
LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,follow_user_num_range,"
    "fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,register_days_range,onehot_feat0"
)
VIDEO = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,"
    "music_type,tag"
)


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns.split(","), restval=0)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kuairand")
    rng = random.Random(0)
    impressions = []
    for day in range(NUM_DAYS):
        # The first day (UTC) is what is left of it after midnight in China.
        for n in range(12 if day == 0 else ROWS_A_DAY):
            at = datetime(2022, 4, 24, 16, tzinfo=UTC) + timedelta(days=day) + timedelta(minutes=-n if day else n)
            click = int(rng.random() < 0.44)
            impressions.append(
                {
                    "user_id": rng.randrange(USERS),
                    "video_id": rng.randrange(VIDEOS),
                    "date": f"{at + timedelta(hours=8):%Y%m%d}",
                    "hourmin": f"{at + timedelta(hours=8):%H}00",
                    "time_ms": int(at.timestamp() * 1000) + rng.randrange(1000),
                    "is_click": click,
                    "long_view": int(click and rng.random() < 0.7),
                    "play_time_ms": rng.randrange(100_000),
                    "duration_ms": 60_000,
                    "tab": rng.choice((0, 1, 1, 1, 4)),
                }
            )
    # A line that the app sent twice, as 2.6 % of the recorded ones.
    write(folder / "log_standard_4_22_to_5_08_pure.csv", LOG, [*impressions, impressions[-1]])
    users = [
        {
            "user_id": n,
            "user_active_degree": rng.choice(("full_active", "high_active", "UNKNOWN")),
            "is_live_streamer": rng.choice((-124, 1)),
            "is_video_author": n % 2,
            "follow_user_num_range": rng.choice(("0", "(0,10]", "500+")),
            "fans_user_num_range": rng.choice(("0", "[1,10)", "[1k,5k)")),
            "friend_user_num_range": rng.choice(("0", "[1,5)", "250+")),
            "register_days_range": rng.choice(("61-90", "730+")),
        }
        for n in range(USERS)
    ]
    write(folder / "user_features_pure.csv", USER, users)
    videos = [
        {
            "video_id": n,
            "author_id": 1000 + n,
            "video_type": "NORMAL",
            "upload_dt": "2022-04-10",
            "upload_type": rng.choice(("LongImport", "Web")),
            "video_duration": "" if n == 1 else 5000.0 + 1000 * n,
            "music_type": 9.0,
            "tag": ("39", "20,43", "")[n % 3],
        }
        for n in range(VIDEOS)
    ]
    write(folder / "video_features_basic_pure.csv", VIDEO, videos)
    path = Path(__file__).parents[3] / "configs" / "kuairand.toml"
    return config.load(path, [f"source.path={folder}", f"storage.root={folder / 'data'}"])


def test_check_finds_nothing_wrong(cfg):
    report = check(cfg, TODAY)
    assert report.wrong == []
    assert cfg.evaluation.validate_from - FIRST == timedelta(days=9)


def test_every_day_is_ingested_with_what_is_declared(cfg):
    last = FIRST + timedelta(days=NUM_DAYS - 1)
    summary = ingest_history(cfg, last, TODAY)
    assert (summary["ingested"], summary["rows"]) == (NUM_DAYS, 12 + (NUM_DAYS - 1) * ROWS_A_DAY + 1)
    storage = Storage(cfg.storage.root)
    items = {row["item_id"]: row for row in storage.read_table("catalogue/items.parquet").to_pylist()}
    assert [items[str(n)]["all_tags"] for n in range(3)] == [["39"], ["20", "43"], None]
    assert [items[str(n)]["main_tag"] for n in range(3)] == ["39", "20", None]
    assert items["0"]["log_duration_s"] == pytest.approx(math.log(6))
    assert items["1"]["log_duration_s"] is None
    users = storage.read_table("catalogue/users.parquet").to_pylist()
    assert {row["is_live_streamer"] for row in users} == {"-124", "1"}
    logged = read_logged(storage, schema.tables(cfg.features), through=last).to_pylist()
    assert {row["tab"] for row in logged} == {"0", "1", "4"}
    tagged = [(row["user_id"], items[row["item_id"]]["main_tag"], row["timestamp"].date(), row["label"]) for row in logged]
    seen = 0
    for row, (user, tag, day, _) in zip(logged, tagged, strict=True):
        before = [label for of, other, on, label in tagged if (of, other) == (user, tag) and on < day] if tag else []
        assert (row["by_main_tag_events"] or 0, row["by_main_tag_positives"] or 0) == (len(before), sum(before)), row
        seen += bool(before)
    assert seen > ROWS_A_DAY, "users come back to tags"
