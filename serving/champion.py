"""Which model version serves: polls the registry's champion, loads and warms it in the background, swaps it in one assignment.

Contract 4: alias and tags are polled; block and slot switch together; every request is scored from exactly one `Loaded`.
A champion that cannot be loaded leaves the one that serves in place, and so does a registry that does not answer.
Where an arm of the experiment asks for the version before the champion, that is kept beside it while its slot is `ready`.
Item features are read anew in the same thread: the store gives up by itself (`features.READ_TIMEOUT_S`).
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from limaml import registry, schema, telemetry
from limaml.config import Config, require_features, require_permitted_version
from limaml.embeddings.published import PublishedEntities
from limaml.embeddings.slot_state import ready_beside
from limaml.errors import ConfigError, StoreError
from limaml.features.encoder import Encoder
from limaml.io.storage import Storage
from limaml.models.network import Network
from serving import ranking
from serving.features import UNAVAILABLE, OnlineFeatures
from serving.held_embeddings import HeldEmbeddings
from serving.items import Items
from serving.loaded import Loaded
from serving.metrics import Metrics
from serving.scorer import Scorer, catalogue_scorer

log = telemetry.get_logger(__name__)

_BUNDLE_FOLDER = "limaml-bundle-"
_WARM_UP_REQUESTS = 5
"""Of each of two sizes: the first passes through a network take several times as long as later ones."""


class Champion:
    """Holds `loaded` (None until a champion has been loaded) and the thread that keeps it current.

    `previous` is the ready version before the champion, None where there is none or no arm asks for it.
    """

    def __init__(self, cfg: Config, metrics: Metrics, *, on_switch: Callable[[], None] = lambda: None) -> None:
        """`on_switch` is called in the polling thread after each change of version or slot."""
        first = cfg.task_kind
        if first.entity_column != "user_id":
            raise ConfigError(f"task_kinds: {first.name} must hang on user_id to be served, got {first.entity_column}")
        self.loaded: Loaded | None = None
        self.previous: Loaded | None = None
        self._wants_previous = any(arm.version == "previous" for arm in cfg.experiment.arms)
        self._cfg = cfg
        self._metrics = metrics
        self._on_switch = on_switch
        self._registry = registry.Registry(cfg.registry)
        self._items = Items(schema.tables(cfg.features).names("item"))
        self._held_kinds = {kind.name: kind.entity_column for kind in cfg.task_kinds if kind.entity_column != "user_id"}
        self._items_due = 0.0
        self._to_reopen: set[str] = set()
        """Slots whose reader may be of another file by now."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._poll_until_stopped, name="champion-poll", daemon=True)
        self._last_errors: dict[str, str] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for loaded in (self.loaded, self.previous):
            if loaded is not None:
                loaded.features.close()

    def poll(self) -> None:
        """Read alias and tags once and act on them. Raises what the registry raises."""
        champion = self._registry.champion()
        self._metrics.polled()
        self._last_errors.pop("champion_poll_failed", None)
        before = self.loaded
        self._follow(champion)
        if self._wants_previous and champion is not None and registry.SLOT in champion.tags:
            self._follow_previous(ready_beside(self._registry, champion), renew=self.loaded is not before)

    def _follow(self, champion: registry.ModelVersion | None) -> None:
        current = self.loaded
        if champion is not None:
            if current is None or (current.version, current.slot) != (champion.version, champion.tags.get(registry.SLOT)):
                self._switch(champion)
                return
            self._load_succeeded()  # the alias is back where it was, if it was elsewhere
            complete = self._complete_through(champion)
            if complete != _known_complete(current):
                # A day has been published: it may have brought new items, which are there before its end is shown.
                self._refresh(current, *complete)
                return
        if current is not None and time.monotonic() >= self._items_due:
            self._refresh(current, *_known_complete(current))

    def _follow_previous(self, found: registry.ModelVersion | None, *, renew: bool) -> None:
        """Keep what is ready beside the champion; with `renew` its items are read anew, as the champion's were."""
        current = self.previous
        wanted = None if found is None else (found.version, found.tags[registry.SLOT])
        if current is not None and (current.version, current.slot) != wanted:
            log.info("previous_dropped", version=current.version)
            self.previous = None
            current.features.close()
        if found is None:
            return
        if current is None or self.previous is None:
            self._load_previous(found)
        elif renew or self._complete_through(found) != _known_complete(current):
            self.previous = self._renewed(current, *self._complete_through(found))

    def _load_previous(self, found: registry.ModelVersion) -> None:
        try:
            loaded = self._load(found)
            self._warm_up(loaded)
        except Exception as error:  # noqa: BLE001 - its arm is then answered by the champion, and counted as such
            self._log_error("previous_load_failed", error, version=found.version)
            return
        self.previous = loaded
        self._last_errors.pop("previous_load_failed", None)
        log.info("previous_loaded", version=loaded.version, slot=loaded.slot)

    def _poll_until_stopped(self) -> None:
        from limaml.features.feature_store import import_feast

        import_feast()  # takes seconds: done before the first champion is there, not when it is

        while not self._stopping.is_set():
            try:
                self.poll()
            except Exception as error:  # noqa: BLE001 - polling goes on, and the version that serves goes on serving
                self._log_error("champion_poll_failed", error)
                self._refresh_without_registry()
            self._stopping.wait(self._cfg.serving.poll_interval_s)

    def _refresh_without_registry(self) -> None:
        if self.loaded is not None and time.monotonic() >= self._items_due:
            self._refresh(self.loaded, *_known_complete(self.loaded))

    def _switch(self, champion: registry.ModelVersion) -> None:
        """Load and warm a version, then let it serve; if that fails, what serves stays."""
        try:
            loaded = self._load(champion)
            self._warm_up(loaded)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the old one serves
            self._metrics.load_failed(True)
            self._log_error("champion_load_failed", error, version=champion.version)
            return
        before, self.loaded = self.loaded, loaded
        if before is not None:
            before.features.close()
        self._load_succeeded()
        self._metrics.serving(loaded.version, loaded.slot, loaded.complete_through)
        log.info("champion_loaded", version=loaded.version, slot=loaded.slot)
        self._on_switch()

    def _load_succeeded(self) -> None:
        self._metrics.load_failed(False)
        self._last_errors.pop("champion_load_failed", None)

    def _load(self, champion: registry.ModelVersion) -> Loaded:
        from limaml.models import bundle

        slot = champion.tags.get(registry.SLOT)
        if slot not in schema.SLOTS:
            raise StoreError(
                f"champion {champion.version} must have the tag {registry.SLOT} in {schema.SLOTS}, got {slot!r}; "
                "cut over to it with `limaml cut-over`, which writes the tag before it moves the alias"
            )
        with tempfile.TemporaryDirectory(prefix=_BUNDLE_FOLDER) as folder:
            loaded = bundle.load(self._registry.download(champion.version, Path(folder)), parts=(bundle.REFIT,))
        require_features(loaded.config, self._cfg, champion.version)
        require_permitted_version(loaded.config, self._cfg)
        prior, kinds = loaded.prior, [kind.name for kind in self._cfg.task_kinds]
        if sorted(prior) != sorted(kinds):
            raise ConfigError(
                f"task_kinds must be the champion's, {sorted(prior)}, got {sorted(kinds)}; serve with its configuration"
            )
        features = OnlineFeatures(self._cfg, slot)
        self._read_items(features)
        complete_through, others_complete = self._complete_through(champion)
        found = Loaded(
            version=champion.version,
            slot=slot,
            complete_through=complete_through,
            network=loaded.network,
            encoder=loaded.encoder,
            prior={kind: vector.numpy() for kind, vector in prior.items()},
            items=self._items,
            scorer=self._scorer(loaded.network, loaded.encoder),
            features=features,
            others_complete=others_complete,
            published={
                kind: PublishedEntities(Storage(self._cfg.storage.root), kind, champion.version, column)
                for kind, column in self._held_kinds.items()
                if self._items.entities(column) is None
            },
        )
        return replace(found, held=self._held(found))

    def _warm_up(self, loaded: Loaded) -> None:
        """Score a few requests as they will come, so that the first real ones are not the slow ones."""
        for size in {1, min(len(loaded.items.catalogue), self._cfg.serving.max_candidates)} - {0}:
            for _ in range(_WARM_UP_REQUESTS):
                now = datetime.now(UTC)
                lookups = ranking.look_up(loaded, UNAVAILABLE, self._cfg, now, range(size))
                _, context_F = loaded.encoder.encode_context({}, now)
                candidate_RF = loaded.encoder.encode_candidates({}, size, now) if loaded.encoder.has_candidates else None
                ranking.score(loaded, list(range(size)), UNAVAILABLE, lookups, context_F, now, candidate_RF)

    def _refresh(self, current: Loaded, complete_through: datetime | None, others: Mapping[str, datetime | None]) -> None:
        """Items and their embeddings as they are now, and the end of the last published day."""
        self.loaded = self._renewed(current, complete_through, others)
        self._metrics.serving(current.version, current.slot, complete_through)

    def _renewed(self, current: Loaded, complete_through: datetime | None, others: Mapping[str, datetime | None]) -> Loaded:
        self._read_items(current.features)
        scorer = current.scorer
        if self._items is not current.items:
            scorer = self._scorer(current.network, current.encoder)
        new = replace(current, complete_through=complete_through, items=self._items, scorer=scorer, others_complete=others)
        return replace(new, held=self._held(new))

    def _scorer(self, network: Network, encoder: Encoder) -> Scorer:
        """Of the items as last read. Vectors are read for it and not kept: it holds what the network makes of them."""
        from limaml.events.catalogue import item_vectors

        vectors = item_vectors(Storage(self._cfg.storage.root), schema.tables(self._cfg.features))
        items = self._items.encode(encoder.with_items(vectors))
        return catalogue_scorer(network, items, encoder.dims.candidate)

    def _read_items(self, features: OnlineFeatures) -> None:
        """Catalogue and item features; what cannot be read stays as last read and is tried again at the next poll."""
        self._items_due = 0.0
        catalogue = self._catalogue()
        try:
            if not features.is_open or features.slot in self._to_reopen:
                features.open()
            rows = features.read_items(catalogue)
            self._last_errors.pop("items_refresh_failed", None)
            self._items_due = time.monotonic() + self._cfg.serving.items_refresh_s
            self._to_reopen.discard(features.slot)
        except Exception as error:  # noqa: BLE001 - contract 6: a server without its online store serves the prior
            self._to_reopen = set(schema.SLOTS)  # it may be another file when it is back: it is opened anew
            self._log_error("items_refresh_failed", error)
            rows = dict(self._items.rows or {})
        if (catalogue, rows) != (self._items.catalogue, self._items.rows):
            self._items = Items(self._items.names, catalogue, rows)

    def _held(self, loaded: Loaded) -> dict[str, HeldEmbeddings]:
        """Of every kind but users; what cannot be read stays as last read, with what it was complete through then."""
        found: dict[str, HeldEmbeddings] = {}
        for kind, column in self._held_kinds.items():
            before = loaded.held.get(kind)
            stored, through = (before.stored, before.complete_through) if before else (None, None)
            of_items = loaded.items.entities(column)
            entities: Sequence[str] = before.entities if before else ()
            if of_items is not None:
                entities = sorted({entity for entity in of_items if entity is not None})
            try:
                if of_items is None:
                    entities = loaded.published[kind].read()
                stored, through = loaded.features.read_embeddings(kind, entities), loaded.others_complete.get(kind)
                self._last_errors.pop("embeddings_refresh_failed", None)
            except Exception as error:  # noqa: BLE001 - contract 6: what cannot be read is scored with the prior
                self._to_reopen, self._items_due = set(schema.SLOTS), 0.0
                self._log_error("embeddings_refresh_failed", error, kind=kind)
            of_kind = {"version": loaded.version, "complete_through": through, "prior_D": loaded.prior[kind]}
            found[kind] = HeldEmbeddings.of(entities, stored, of_items=of_items, **of_kind)  # type: ignore[arg-type]
        return found

    def _complete_through(self, champion: registry.ModelVersion) -> tuple[datetime | None, dict[str, datetime | None]]:
        """Of the first kind, and of those behind it."""
        tags = registry.complete_through_tags([kind.name for kind in self._cfg.task_kinds])
        found = {kind: _instant(champion.tags.get(tag)) for kind, tag in tags.items()}
        return found.pop(self._cfg.task_kind.name), found

    def _catalogue(self) -> tuple[str, ...]:
        """Item ids. Raises what storage raises, while there is no earlier catalogue to go on with."""
        from limaml.events import catalogue

        try:
            ids = catalogue.read(Storage(self._cfg.storage.root), "item")["item_id"].to_pylist()
            self._last_errors.pop("catalogue_refresh_failed", None)
        except Exception as error:
            if not self._items.catalogue:
                raise
            self._log_error("catalogue_refresh_failed", error)
            return self._items.catalogue
        return tuple(sorted(ids))

    def _log_error(self, event: str, error: Exception, **fields: str) -> None:
        """Once for a series of equal errors: polling repeats them every few seconds."""
        message = f"{type(error).__name__}: {error}"
        cause = re.sub(_BUNDLE_FOLDER + r"\w+", "", message)  # it has another name each time
        if self._last_errors.get(event) != cause:
            log.error(event, error=message, serving=self.loaded.version if self.loaded else None, **fields)
        self._last_errors[event] = cause


def _known_complete(loaded: Loaded) -> tuple[datetime | None, Mapping[str, datetime | None]]:
    return loaded.complete_through, loaded.others_complete


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
