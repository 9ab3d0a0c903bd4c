"""Which vectors of items are made here, of what, and by which encoder."""

import string
from typing import Self

from pydantic import model_validator

from limaml.config.names import TransferProvider
from limaml.config.section import Name, PositiveCount, Section

_OF_TEXT = ("minilm", "static", "folder")
_OF_A_FILE = ("static", "folder", "table", "graph")


class TransferConfig(Section):
    """A vector of the item that `limaml embed-items` makes (docs/transfer.md), once an item: what it was first made stays."""

    feature: Name
    """The declared vector. Its `encoder` and `licence` must be the encoder's own, its `width` the encoder's."""
    provider: TransferProvider
    """minilm: all-MiniLM-L6-v2, of a package. static: a vector a token, as `limaml distil-encoder` leaves them. folder: a BERT
    encoder as sentence-transformers keeps it. table: vectors that something else made, of any modality. graph: the leading
    vectors of a knowledge graph. Or one that is registered (docs/extend.md)."""
    path: str = ""
    """static, folder: the folder of the encoder's files. table: a Parquet or CSV file with `item_id` and `vector`, also a URL.
    graph: a file of triples, `NAME.kg`, beside `NAME.link` with the items' entities. Nothing is fetched."""
    template: str = ""
    """minilm, static, folder: the text of an item, with the catalogue's columns in braces: `"{title}. {genres}"`. A set is
    joined with commas, what is missing is empty; an item of which all are missing has no vector."""
    batch_items: PositiveCount = 64
    """Items that are encoded together: bounds memory."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The catalogue's columns that the template names."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    @model_validator(mode="after")
    def _template_names_columns(self) -> Self:
        try:
            parts = [part for part in string.Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(self._not(f"template must hold columns in braces, got {self.template!r}: {error}")) from None
        if any(not name or set(name) & set(".[]") or form or conversion for _, name, form, conversion in parts):
            raise ValueError(self._not(f"template must hold names of columns alone in its braces, got {self.template!r}"))
        return self

    @model_validator(mode="after")
    def _provider_has_what_it_reads(self) -> Self:
        if self.provider in _OF_TEXT and not self.columns:
            raise ValueError(self._not(f"template must name a column of the catalogue, got {self.template!r}"))
        if self.provider in ("table", "graph") and self.template:
            raise ValueError(self._not(f"template must be of an encoder of text, got {self.template!r}"))
        if self.provider in _OF_A_FILE and not self.path:
            raise ValueError(self._not("path must say where it lies, got ''"))
        if self.provider == "minilm" and self.path:
            raise ValueError(self._not(f"path must be empty, the package has its files, got {self.path!r}"))
        return self

    def _not(self, rule: str) -> str:
        return f"{rule}; correct the [[transfer]] of {self.feature} by {self.provider}"
