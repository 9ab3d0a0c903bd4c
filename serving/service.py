"""The BentoML service: `POST /rank`, `/metrics`, `/livez`, `/readyz`, OpenAPI on `/`.

Started by `python -m serving.run --config …`; LIMAML_CONFIG names the configuration. What imports torch, Feast and MLflow
is imported when a worker starts, so that BentoML's supervising process stays small.
"""

import gc
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import bentoml

from limaml import config, telemetry
from limaml.errors import ConfigError
from serving.api import ErrorDetail, ErrorResponse, RankRequest, RankResponse, RequestError, check_catalogue, request_model
from serving.errors import RequestGuard

if TYPE_CHECKING:
    from serving.champion import Loaded

NAME = "limaml_ranking"
PATH = "/rank"


def _config() -> config.Config:
    path = os.environ.get("LIMAML_CONFIG")
    if not path:
        raise ConfigError("LIMAML_CONFIG must name the configuration file, e.g. configs/movielens.toml; it is not set")
    return config.load(path)


CONFIG = _config()
Request = request_model(CONFIG.serving.max_candidates)


class DocumentedService(bentoml.Service[Any]):  # type: ignore[misc]
    """A BentoML service whose OpenAPI page shows our refusals, not BentoML's own."""

    @property
    def openapi_spec(self) -> Any:
        page = super().openapi_spec
        responses = page.paths[PATH].post["responses"]
        refusals = {400: "Bad request", 415: "Not JSON", 503: "No champion yet"}
        content = {"application/json": {"schema": ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")}}
        page.paths[PATH].post["responses"] = {
            200: responses[200],
            **{status: {"description": text, "content": content} for status, text in refusals.items()},
        }
        page.components["schemas"]["ErrorDetail"] = ErrorDetail.model_json_schema()
        return page


@bentoml.service(
    name=NAME,
    service_class=DocumentedService,
    workers=CONFIG.serving.workers,
    # BentoML keeps a timer a request for this long: a small value keeps them, and the garbage collector's work, few.
    traffic={"timeout": CONFIG.serving.timeout_s},
    http={"host": CONFIG.serving.host, "port": CONFIG.serving.port},
    # Requests are counted in /metrics; a line each would cost more than the ranking's own log.
    logging={"access": {"enabled": False}},
)
class Ranking:
    """Ranks candidate items for a user with the promoted model.

    A request that cannot be answered gets 400 (415 for another content type, 503 before any champion exists) and
    `{"error": {"field", "rule", "value", "remedy"}}`. Missing personalisation is never an error: see `fallback`.
    """

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            # Under this other name Feast would make a folder of its own in /tmp for each worker.
            os.environ.setdefault("PROMETHEUS_MULTIPROCESS_DIR", folder)
        import torch

        from serving import ranking
        from serving.champion import Champion
        from serving.metrics import Metrics

        telemetry.configure()
        # One request is a few thousand multiplications: threads would cost more than they save.
        torch.set_num_threads(1)
        self._ranking = ranking
        self._metrics = Metrics()
        self._metrics.start([kind.name for kind in CONFIG.task_kinds])
        self._champion = Champion(CONFIG, on_switch=self._switched)
        self._frozen = False
        self._champion.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        self._champion.stop()

    async def __is_ready__(self) -> bool:
        return self._champion.loaded is not None

    @bentoml.api(route=PATH, output_spec=RankResponse)  # type: ignore[untyped-decorator]
    async def rank(self, request: Request, /) -> Any:  # type: ignore[valid-type]
        """Score the candidates and return them best first, with the model version and what is known of the embedding.

        Errors: 400, 415 or 503 with {"error": {"field", "rule", "value", "remedy"}}.
        """
        try:
            return await self._rank(request, datetime.now(UTC))
        except RequestError as error:
            from starlette.responses import JSONResponse

            return JSONResponse(error.body, status_code=error.status)

    async def _rank(self, request: RankRequest, now: datetime) -> RankResponse:
        loaded = self._champion.loaded
        if loaded is None:
            raise RequestError(
                503,
                field="(service)",
                rule="must have loaded a champion",
                value=None,
                remedy="promote a model with `limaml cut-over` (the DAG limaml_train does); /readyz says when it is loaded",
            )
        check_catalogue(request, loaded.catalogue)
        started = time.perf_counter()
        fetched = await loaded.features.fetch(request.user_id, request.item_ids)
        read = time.perf_counter()
        lookups = self._ranking.look_up(loaded, fetched, CONFIG, now)
        scores = self._ranking.score(loaded, request, fetched, lookups, now)
        scored = time.perf_counter()
        self._metrics.stage("features", read - started)
        self._metrics.stage("score", scored - read)
        self._metrics.ranked(scores)
        for kind, lookup in lookups.items():
            self._metrics.looked_up(kind, lookup)
        return self._ranking.respond(loaded, request, scores, lookups)

    def _switched(self, loaded: "Loaded") -> None:
        self._metrics.serving(loaded.version, loaded.slot)
        if not self._frozen:
            # Full collections over what start-up imported took 200 ms and more: it is set aside once, after warm-up.
            gc.collect()
            gc.freeze()
            self._frozen = True


# `bentoml.service` makes the class a Service, which a class decorator cannot tell the type checker.
Ranking.add_asgi_middleware(RequestGuard, path=PATH, request_type=Request)  # type: ignore[attr-defined]
