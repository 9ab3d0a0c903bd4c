"""What a request is scored from."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from limaml.features.columns import Floats
from limaml.features.encoder import Encoder
from limaml.models.network import LiMAML
from serving.features import OnlineFeatures
from serving.items import Items
from serving.scorer import CatalogueScorer


@dataclass(frozen=True)
class Loaded:
    """One model version with its slot; never changed, only replaced, so that a request keeps to the one it began with."""

    version: str
    slot: str
    complete_through: datetime | None
    """End of the last day published whole into the slot; None before the first one is known."""
    network: LiMAML
    encoder: Encoder
    prior: Mapping[str, Floats]
    """Task kind -> (D,) embedding of an empty support."""
    items: Items
    scorer: CatalogueScorer
    """Of the network and the items."""
    features: OnlineFeatures
