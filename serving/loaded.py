"""What a request is scored from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from limaml.embeddings.published import PublishedEntities
from limaml.features.columns import Floats
from limaml.features.encoder import Encoder
from limaml.models.network import Network
from serving.features import OnlineFeatures
from serving.held_embeddings import HeldEmbeddings
from serving.items import Items
from serving.scorer import Scorer


@dataclass(frozen=True)
class Loaded:
    """One model version with its slot; never changed, only replaced, so that a request keeps to the one it began with."""

    version: str
    slot: str
    complete_through: datetime | None
    """End of the last day published whole into the slot, of the first kind; None before the first one is known."""
    network: Network
    encoder: Encoder
    prior: Mapping[str, Floats]
    """Task kind -> (D,) embedding of an empty support."""
    items: Items
    scorer: Scorer
    """Of the network and the items."""
    features: OnlineFeatures
    published: Mapping[str, PublishedEntities] = field(default_factory=dict)
    """Of the kinds whose entities requests name: no catalogue says which there are."""
    held: Mapping[str, HeldEmbeddings] = field(default_factory=dict)
    """Of all kinds but users."""
    others_complete: Mapping[str, datetime | None] = field(default_factory=dict)
    """`complete_through` of the kinds behind the first."""
