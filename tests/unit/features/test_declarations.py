"""Features that cannot be declared together: the configuration names the feature, the rule and what it got."""

import re

import pytest

from limaml import config
from limaml.errors import ConfigError

SHOP = """
[source]
kind = "synthetic"

[[features]]
entity = "item"
name = "brand"
type = "category"

[[features]]
entity = "context"
name = "page"
type = "category"

[[features]]
entity = "event"
name = "paid"
type = "number"

[[features]]
entity = "user"
name = "mean_paid"
type = "number"
aggregate = "mean"
of = "paid"
"""


def block(**values):
    return "\n".join(["[[features]]", *(f'{name} = "{value}"' for name, value in values.items()), ""])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            block(entity="item", name="brand", type="number"),
            "features must be declared once each, got brand more than once; rename or remove one",
        ),
        (
            block(entity="user", name="brand", type="category"),
            "features must be declared once each, got brand more than once; rename or remove one",
        ),
        (
            block(entity="item", name="label", type="number"),
            "features must not be named as the columns of events are, got label; rename them",
        ),
        (
            block(entity="user", name="mean_brand", type="number", aggregate="mean", of="brand"),
            "the mean mean_brand must be of a number of the event or the context, one of ['paid'], got 'brand', a category of "
            "the item; declare it, or name another",
        ),
        (
            block(entity="user", name="mean_page", type="number", aggregate="mean", of="page"),
            "the mean mean_page must be of a number of the event or the context, one of ['paid'], got 'page', a category of "
            "the context; declare it, or name another",
        ),
        (
            block(entity="user", name="mean_cost", type="number", aggregate="mean", of="cost"),
            "the mean mean_cost must be of a number of the event or the context, one of ['paid'], got 'cost'; declare it",
        ),
        (
            block(entity="user", name="paid_events", type="number", aggregate="count", by="paid"),
            "paid_events must be by item_id or a category of the item, one of ['item_id', 'brand'], got 'paid'; declare it",
        ),
    ],
    ids=["twice", "of two entities", "reserved", "mean of an item", "mean of text", "mean of nothing", "by a number"],
)
def test_what_does_not_fit_is_named(tmp_path, more, message):
    path = tmp_path / "shop.toml"
    path.write_text(SHOP)
    assert len(config.load(path).features) == 4
    path.write_text(SHOP + more)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(path)
