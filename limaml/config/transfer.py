"""Which vectors of items are made here, of what, and by which encoder."""

import string
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from limaml.config.names import TransferProvider
from limaml.config.section import Name, OpenShare, Positive, PositiveCount, Section

_OF_TEXT = ("minilm", "static", "folder", "onnx")
_OF_A_FILE = ("static", "folder", "onnx", "table", "graph")


class TransferConfig(Section):
    """A vector of the item that `limaml embed-items` makes (docs/transfer.md), once an item: what it was first made stays."""

    feature: Name
    """The declared vector. Its `encoder` and `licence` must be the encoder's own, its `width` the encoder's."""
    provider: TransferProvider
    """minilm: all-MiniLM-L6-v2, of a package. static: a vector a token, as `limaml distil-encoder` leaves them. folder: a BERT
    encoder as sentence-transformers keeps it. onnx: one of any architecture, as an ONNX file. table: vectors that something
    else made, of any modality. graph: the leading vectors of a knowledge graph. Or one that is registered (docs/extend.md)."""
    path: str = ""
    """static, folder, onnx: the folder of the encoder's files. table: a Parquet or CSV file with `item_id` and `vector`, also a
    URL. graph: a file of triples, `NAME.kg`, beside `NAME.link` with the items' entities. Nothing is fetched."""
    template: str = ""
    """minilm, static, folder, onnx: the text of an item, with the catalogue's columns in braces: `"{title}. {genres}"`. A set
    is joined with commas, what is missing is empty; an item of which all are missing has no vector."""
    batch_items: PositiveCount = 64
    """Items that are encoded together: bounds memory."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The catalogue's columns that the template names."""
        return _columns(self.template)

    @property
    def place(self) -> str:
        """Where the template stands."""
        return f"transfer.template of {self.feature}"

    @model_validator(mode="after")
    def _template_names_columns(self) -> Self:
        if wrong := _wrong_template(self.template):
            raise ValueError(self._not(wrong))
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


class TuningConfig(Section):
    """How `limaml tune-encoder` adapts an encoder of text to the domain (docs/transfer.md). Nothing else reads it."""

    path: str = ""
    """Folder of the BERT encoder that is adapted; empty: all-MiniLM-L6-v2, of its package."""
    template: str = ""
    """The text of an item, as in `[[transfer]]`."""
    align: Literal["vectors", "pairs"] = "vectors"
    """What an item's text is aligned with. vectors: its fitted item vector. pairs: the text of an item that a user took
    positively just after or before it."""
    pair_hours: Positive = 24.0
    """pairs: how far apart two rows of a pair may be."""
    min_item_rows: PositiveCount = 5
    """Items with fewer rows are left out: their vectors say little."""
    held_out_items: OpenShare = 0.2
    """Share of the items, by a hash of the id, that stages and early stopping are judged on. They are not trained on."""
    rank: PositiveCount = 8
    """Of each adapter, a product of two low-rank matrices added to the query's and to the value's weights of a layer."""
    layers: PositiveCount = 6
    """Uppermost layers with adapters; no more than the encoder has."""
    max_parameters: PositiveCount = 200_000
    """Most numbers that may be trained, head included; more are refused."""
    max_ms_per_item: Positive | None = None
    """Most milliseconds an item's text may take on one thread, before and after tuning; a slower encoder is refused. None: not
    measured."""
    lr: Positive = 2e-2
    """Learning rate of the head."""
    adapter_lr: Positive = 1e-3
    """Learning rate of the last layer's adapters."""
    layer_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Each layer's rate is this times the rate of the layer above it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Of the head."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Of what the head reads."""
    temperature: Positive = 0.1
    """Cosines are divided by it."""
    batch_items: Annotated[int, Field(ge=2)] = 64
    """Items of a step: each is the others' negative."""
    max_epochs: PositiveCount = 20
    """Most passes over the items in each stage."""
    domain_epochs: Annotated[int, Field(ge=0)] = 0
    """Most passes of a stage before these: every text of the catalogue is contrasted with itself under another dropout
    (Gao et al. 2021), which needs no row. 0: no such stage."""
    patience: PositiveCount = 2
    """A stage ends when so many passes have not lowered the held-out items' loss."""
    seed: int = 0
    """Of the start, the batches, the pairs and the dropout."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The catalogue's columns that the template names."""
        return _columns(self.template)

    @property
    def place(self) -> str:
        """Where the template stands."""
        return "tuning.template"

    @model_validator(mode="after")
    def _template_names_columns(self) -> Self:
        if wrong := _wrong_template(self.template):
            raise ValueError(f"{wrong}; correct it in [tuning]")
        return self


def _columns(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def _wrong_template(template: str) -> str:
    """What is wrong with it; empty if nothing is."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        return f"template must hold columns in braces, got {template!r}: {error}"
    if any(not name or set(name) & set(".[]") or form or conversion for _, name, form, conversion in parts):
        return f"template must hold names of columns alone in its braces, got {template!r}"
    return ""
