"""Which model version serves: polls the registry's champion, loads it in the background, swaps it in one assignment.

Contract 4: alias and tags are polled; block and slot switch together; every request is scored from exactly one `Loaded`.
A champion that cannot be loaded leaves the one that serves in place.
"""

import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from limaml import registry, schema, telemetry
from limaml.config import Config
from limaml.data.encoding import Encoder
from limaml.data.storage import Storage
from limaml.errors import ConfigError, StoreError
from limaml.models.network import LiMAML
from serving.features import OnlineFeatures

log = telemetry.get_logger(__name__)

WARM_UP_S = 60.0
"""MovieLens' 1,682 items are read in a tenth of a second; a store that takes longer than this hangs."""


@dataclass(frozen=True)
class Loaded:
    """Everything a request is scored from; never changed, only replaced."""

    version: str
    slot: str
    complete_through: datetime | None
    """End of the last day published whole into the slot; None before the first one is known."""
    network: LiMAML
    encoder: Encoder
    prior: Mapping[str, Tensor]
    """Task kind -> (D,) embedding of an empty support."""
    catalogue: frozenset[str]
    features: OnlineFeatures


class Champion:
    """Holds `loaded` (None until a champion has been loaded) and the thread that keeps it current."""

    def __init__(self, cfg: Config, *, on_switch: Callable[[Loaded], None]) -> None:
        """`on_switch` is called in the polling thread after each change of version or slot."""
        for kind in cfg.task_kinds:
            if kind.entity_column != "user_id":
                raise ConfigError(f"task_kinds: {kind.name} must hang on user_id to be served, got {kind.entity_column}")
        self.loaded: Loaded | None = None
        self._cfg = cfg
        self._on_switch = on_switch
        self._registry = registry.Registry(cfg.registry)
        self._pool = ThreadPoolExecutor(cfg.serving.store_threads, thread_name_prefix="online-store")
        self._last_items: dict[str, tuple[Any, ...]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll_until_stopped, name="champion-poll", daemon=True)
        self._last_errors: dict[str, str] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End polling and look-ups; a read that hangs is left behind."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def poll(self) -> None:
        """Read alias and tags once and act on them. Raises what registry, bundle or catalogue raise."""
        champion = self._registry.champion()
        if champion is None:
            return
        current = self.loaded
        if current is None or (current.version, current.slot) != (champion.version, champion.tags.get(registry.SLOT)):
            self.loaded = self._load(champion)
            log.info("champion_loaded", version=self.loaded.version, slot=self.loaded.slot)
            self._on_switch(self.loaded)
            return
        complete_through = _complete_through(champion)
        if complete_through != current.complete_through:
            # A day has been published: it may have brought new items.
            current = replace(current, complete_through=complete_through, catalogue=self._catalogue())
        if current.features.failed:
            current = replace(current, features=self._open_features(current.slot, current.catalogue))
        self.loaded = current

    def _poll_until_stopped(self) -> None:
        from limaml.data.feature_store import import_feast

        import_feast()  # takes seconds: done before the first champion is there, not when it is

        while not self._stopping.is_set():
            try:
                self.poll()
                self._last_errors.pop("champion_poll_failed", None)
            except Exception as error:  # noqa: BLE001 - polling goes on, and the version that serves goes on serving
                self._log_error("champion_poll_failed", error)
            self._stopping.wait(self._cfg.serving.poll_interval_s)

    def _load(self, champion: registry.ModelVersion) -> Loaded:
        from limaml.models import bundle

        slot = champion.tags.get(registry.SLOT)
        if slot not in schema.SLOTS:
            raise StoreError(
                f"champion {champion.version} must have the tag {registry.SLOT} in {schema.SLOTS}, got {slot!r}; "
                "cut over to it with `limaml cut-over`, which writes the tag before it moves the alias"
            )
        with tempfile.TemporaryDirectory(prefix="limaml-bundle-") as folder:
            loaded = bundle.load(self._registry.download(champion.version, Path(folder)), parts=(bundle.REFIT,))
        prior, kinds = loaded.prior, [kind.name for kind in self._cfg.task_kinds]
        if sorted(prior) != sorted(kinds):
            raise ConfigError(
                f"task_kinds must be the champion's, {sorted(prior)}, got {sorted(kinds)}; serve with its configuration"
            )
        catalogue = self._catalogue()
        return Loaded(
            version=champion.version,
            slot=slot,
            complete_through=_complete_through(champion),
            network=loaded.network,
            encoder=loaded.encoder,
            prior=prior,
            catalogue=catalogue,
            features=self._open_features(slot, catalogue),
        )

    def _catalogue(self) -> frozenset[str]:
        from limaml.data import catalogue

        return frozenset(catalogue.read(Storage(self._cfg.storage.root), "item")["item_id"].to_pylist())

    def _open_features(self, slot: str, catalogue: frozenset[str]) -> OnlineFeatures:
        """Features of a slot, every item read once; without the store it is marked failed and tried again at the next poll."""
        features = OnlineFeatures(self._cfg, slot, self._pool, self._last_items)

        def open_and_warm_up() -> None:
            features.open()
            features.warm_up(sorted(catalogue))

        try:
            # In the pool, because a store that hangs must not keep the poller from following the champion.
            self._pool.submit(open_and_warm_up).result(WARM_UP_S)
            self._last_errors.pop("online_store_failed", None)
        except Exception as error:  # noqa: BLE001 - contract 6: a server without its online store serves the prior
            features.failed = True
            self._log_error("online_store_failed", error)
        return features

    def _log_error(self, event: str, error: Exception) -> None:
        """Once for a series of equal errors: polling repeats them every few seconds."""
        message = f"{type(error).__name__}: {error}"
        if self._last_errors.get(event) != message:
            log.error(event, error=message, serving=self.loaded.version if self.loaded else None)
        self._last_errors[event] = message


def _complete_through(champion: registry.ModelVersion) -> datetime | None:
    text = champion.tags.get(registry.COMPLETE_THROUGH)
    return datetime.fromisoformat(text) if text else None
