"""The BentoML service: `POST /rank`, `/metrics`, `/livez`, `/readyz`, OpenAPI on `/`.

Started by `python -m serving.run --config …`; LIMAML_CONFIG names the configuration. What imports torch, Feast and MLflow
is imported when a worker starts, so that BentoML's supervising process stays small.
"""

import gc
import os
import sys
from typing import Any

import bentoml

from limaml import config, schema, telemetry
from limaml.errors import ConfigError
from serving.api import ErrorDetail, ErrorResponse, RankResponse, RequestError, request_model
from serving.auth import read_token
from serving.endpoint import RankEndpoint

NAME = "limaml_ranking"
PATH = "/rank"
_SWITCH_INTERVAL_S = 0.0001
"""Reads of the store, and loading a champion, run in other threads. One that has its answer would wait for Python's lock for
5 ms (the default) while the loop is busy, and the loop as long for a thread that encodes."""


def _config() -> config.Config:
    path = os.environ.get("LIMAML_CONFIG")
    if not path:
        raise ConfigError("LIMAML_CONFIG must name the configuration file, e.g. configs/movielens.toml; it is not set")
    return config.load(path)


CONFIG = _config()
Request = request_model(CONFIG.serving.max_candidates, schema.tables(CONFIG.features))
ENDPOINT = RankEndpoint(CONFIG.serving, path=PATH, request_type=Request, token=read_token(CONFIG.serving))


class RankingService(bentoml.Service[Any]):  # type: ignore[misc]
    """A BentoML service whose `/rank` is our endpoint, and whose OpenAPI page shows our refusals, not BentoML's own."""

    def to_asgi(self, is_main: bool = True) -> Any:
        ENDPOINT.others = super().to_asgi(is_main=is_main)
        return ENDPOINT

    @property
    def openapi_spec(self) -> Any:
        page = super().openapi_spec
        responses = page.paths[PATH].post["responses"]
        refusals = {
            400: "Bad request",
            401: "No token, or a wrong one, where one is asked for",
            415: "Not JSON",
            500: "Internal error",
            503: "No champion yet, or too many requests (Retry-After)",
            504: "Not answered in time",
        }
        content = {"application/json": {"schema": ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")}}
        page.paths[PATH].post["responses"] = {
            200: responses[200],
            **{status: {"description": text, "content": content} for status, text in refusals.items()},
        }
        page.components["schemas"]["ErrorDetail"] = ErrorDetail.model_json_schema()
        return page


@bentoml.service(
    name=NAME,
    service_class=RankingService,
    workers=CONFIG.serving.workers,
    # BentoML keeps a timer a request for this long, on its own pages.
    traffic={"timeout": CONFIG.serving.timeout_s},
    http={"host": CONFIG.serving.host, "port": CONFIG.serving.port},
    # Requests are counted in /metrics; a line each would cost more than the ranking's own log.
    logging={"access": {"enabled": False}},
)
class Ranking:
    """Ranks candidate items for a user with the promoted model.

    A request that cannot be answered gets 400 (401 without the token, 415 for another content type, 503 before any champion
    exists and when too many requests are in flight) and `{"error": {"field", "rule", "value", "remedy"}}`. Missing
    personalisation is never an error: see `fallback`.
    """

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            # Under this other name Feast would make a folder of its own in /tmp for each worker.
            os.environ.setdefault("PROMETHEUS_MULTIPROCESS_DIR", folder)

        from serving.champion import Champion
        from serving.metrics import Metrics
        from serving.ranker import Ranker
        from serving.request_log import RequestLog
        from serving.store_calls import StoreCalls

        telemetry.configure()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._metrics = Metrics()
        categories = [f.name for f in CONFIG.features if f.type in ("category", "categories") and f.entity != "item"]
        arms = [arm.name for arm in CONFIG.experiment.arms]
        self._metrics.start([kind.name for kind in CONFIG.task_kinds], categories, arms)
        self._calls = StoreCalls(CONFIG.serving, on_breaker=self._metrics.breaker_open)
        self._champion = Champion(CONFIG, self._metrics, on_switch=self._switched)
        self._log = RequestLog(CONFIG)
        self._ranker = Ranker(CONFIG, self._metrics, self._champion, self._calls, self._log)
        ENDPOINT.bind(self._ranker.rank, self._metrics)
        self._frozen = False
        self._champion.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        self._champion.stop()
        self._calls.stop()
        self._log.close()
        self._metrics.flush()

    async def __is_ready__(self) -> bool:
        return self._champion.loaded is not None

    @bentoml.api(route=PATH, output_spec=RankResponse)  # type: ignore[untyped-decorator]
    async def rank(self, request: Request, /) -> Any:  # type: ignore[valid-type]
        """Score the candidates and return them best first, with the model version and what is known of the embedding.

        Errors: 400, 401, 415, 500, 503 or 504 with {"error": {"field", "rule", "value", "remedy"}}.
        """
        # For a caller inside BentoML; over HTTP `serving.endpoint` answers.
        try:
            return RankResponse.model_validate_json(await self._ranker.rank(request))
        except RequestError as error:
            from starlette.responses import JSONResponse

            return JSONResponse(error.body, status_code=error.status, headers=dict(error.headers))

    def _switched(self) -> None:
        if not self._frozen:
            # Full collections over what start-up imported took 200 ms and more: it is set aside once, after warm-up.
            gc.collect()
            gc.freeze()
            self._frozen = True
