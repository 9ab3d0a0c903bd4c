"""The text of an item: a template over the delivered catalogue."""

import pyarrow as pa
import pytest
from pydantic import ValidationError

from limaml.config import TransferConfig
from limaml.errors import ConfigError
from limaml.transfer.texts import texts_of

ITEMS = pa.table(
    {
        "item_id": ["1", "2", "3", "4"],
        "title": ["Toy Story ", None, "{Heat}", ""],
        "genres": pa.array([["Animation", "Comedy"], ["War"], None, []]),
        "year": pa.array([1995.0, None, float("nan"), None]),
        "price": [1.5, None, None, None],
        "seen": [7, None, None, None],
    }
)


def text(template, **more):
    return TransferConfig(feature="meaning", provider="minilm", template=template, **more)


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{title}. {genres}", ["Toy Story. Animation, Comedy", ". War", "{Heat}.", None]),
        ("{{{title}}} {title}", ["{Toy Story} Toy Story", None, "{{Heat}} {Heat}", None]),
        ("{year} {price} {seen}", ["1995 1.5 7", None, None, None]),
    ],
)
def test_sets_are_joined_and_what_is_missing_is_empty(template, texts):
    assert texts_of(text(template), ITEMS) == texts


def test_a_column_that_the_catalogue_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(ConfigError, match="got 'plot'; there are: genres, price, seen, title, year"):
        texts_of(text("{title} {plot}"), ITEMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "title"}, "template must name a column of the catalogue, got 'title'"),
        ({"template": "{title"}, "template must hold columns in braces"),
        ({"template": "{}"}, "template must hold names of columns alone"),
        ({"template": "{title.__class__}"}, "template must hold names of columns alone"),
        ({"template": "{title!r}"}, "template must hold names of columns alone"),
        ({"template": "{title:>9}"}, "template must hold names of columns alone"),
        ({"path": "somewhere"}, "path must be empty, the package has its files"),
        ({"provider": "folder"}, "path must say where it lies, got ''; correct the .* of meaning by folder"),
        ({"provider": "table", "path": "x"}, "template must be of an encoder of text"),
        ({"provider": "word2vec"}, "must be one of .*minilm.*; correct it, or register what it names"),
        ({"batch_items": 0}, "greater than or equal to 1"),
    ],
)
def test_a_declaration_that_cannot_be(change, message):
    text("{title}")
    with pytest.raises(ValidationError, match=message):
        TransferConfig(**{"feature": "meaning", "provider": "minilm", "template": "{title}"} | change)
