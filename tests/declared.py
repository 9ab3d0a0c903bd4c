"""Features of a film catalogue, which most tests' tables have: those that the shipped configuration declares."""

from pathlib import Path

from limaml import config, schema

FEATURES = config.load(Path(__file__).parents[1] / "configs" / "movielens.toml").features
TABLES = schema.tables(FEATURES)
USERS, ITEMS = TABLES.catalogue("user"), TABLES.catalogue("item")
USER_FEATURES, ITEM_FEATURES = TABLES.snapshots("user"), TABLES.snapshots("item")
USER_FEATURE_NAMES, ITEM_FEATURE_NAMES = TABLES.names("user"), TABLES.names("item")
LOGGED_EVENTS, REQUEST_LOG = TABLES.logged_events, TABLES.request_log
AGE_BANDS = next(feature.values for feature in FEATURES if feature.name == "age_band")
