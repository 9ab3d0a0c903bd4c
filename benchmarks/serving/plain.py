"""The service one would write without a feature store, a registry or BentoML: FastAPI, redis-py and torch, in one file.

It does the ranking's work: checks the request, reads the user's features and embedding in one packed Redis value, encodes them,
scores the candidates with the same weights, sorts, and says what the scores rest on. Items lie in memory as tensors. Left out
are metrics, versions that switch, time budgets, limits of load and refusals with a remedy: what ours does beside the ranking
counts against ours.

    python -m benchmarks.serving.plain --port 8000 --redis 127.0.0.1:6379 --bundle FOLDER --items items.json --version 1

F features, H hidden width, R candidates, K = D - 1 factors
"""

import argparse
import gc
import json
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis.asyncio
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field

from limaml import schema
from limaml.models import bundle
from limaml.tasks.rows import Rows

KEY = "plain:"


class UserRow(msgspec.Struct, array_like=True):
    """What Redis holds of a user, as MessagePack."""

    features: dict[str, Any]
    embedding: bytes
    """float32."""
    model_version: str
    as_of_s: float
    last_event_s: float


class Context(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    hour: int = Field(ge=0, le=23)


class PlainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    user_id: str = Field(min_length=1, max_length=256)
    item_ids: list[str] = Field(min_length=1, max_length=1000)
    context: Context


class Model:
    """Weights and encoder of a bundle, with all items encoded once."""

    def __init__(self, folder: Path, items: dict[str, dict[str, Any]]) -> None:
        loaded = bundle.load(folder, parts=(bundle.REFIT,))
        self._encoder, network = loaded.encoder, loaded.network
        self.kind = network.kind
        self._prior_D = loaded.prior[network.kind]
        self._layers = list(network.global_block.mlp.linears)
        self.index = {item: at for at, item in enumerate(items)}
        names = schema.tables(self._encoder.features).names("item")
        columns = {name: [row[name] for row in items.values()] for name in names}
        rows = Rows.from_encoded(self._encoder.encode({**columns, "item_id": list(items)}, len(items)))
        with torch.inference_mode():
            self._dense_IF = rows.item_dense_TRF[0]
            self._vectors_IK = network.global_block.items(rows.item_index_TR, rows.item_dense_TRF)[0]

    @torch.inference_mode()
    def score(self, user: UserRow, hour: int, item_ids: list[str], *, personalised: bool) -> list[float]:
        """(R,) probabilities, with the prior unless `personalised`. Raises KeyError for an item not in the catalogue."""
        at = torch.tensor([self.index[item] for item in item_ids])
        beside = torch.from_numpy(self._beside(user, hour)).expand(len(at), -1)
        x = torch.cat([self._dense_IF[at], beside], dim=1)
        for layer in self._layers[:-1]:
            x = F.silu(layer(x))
        e_D = torch.frombuffer(bytearray(user.embedding), dtype=torch.float32) if personalised else self._prior_D
        logits = self._layers[-1](x)[:, 0] + self._vectors_IK[at] @ e_D[:-1] + e_D[-1]
        scores: list[float] = torch.sigmoid(logits).tolist()
        return scores

    def _beside(self, user: UserRow, hour: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """User and context features, as the encoder has them."""
        now = datetime.now(UTC)
        user_F = self._encoder.encode_user(user.features, now)
        return np.concatenate([user_F, self._encoder.encode_context({"hour": hour}, now)[1]])


def make_app(model: Model, address: str, version: str) -> FastAPI:
    host, port = address.split(":")
    store = redis.asyncio.Redis(host=host, port=int(port))
    decoder = msgspec.msgpack.Decoder(UserRow)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        gc.collect()
        gc.freeze()
        yield
        await store.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def readyz() -> dict[str, bool]:
        await store.get(KEY)
        return {"ready": True}

    @app.post("/rank")
    async def rank(request: PlainRequest) -> Response:
        items = request.item_ids
        if len(set(items)) != len(items) or not all(item in model.index for item in items):
            raise HTTPException(400, "item_ids must be in the catalogue, each once")
        packed = await store.get(KEY + request.user_id)
        if packed is None:
            raise HTTPException(404, "user_id is not known")
        user = decoder.decode(packed)
        personalised = user.model_version == version
        scores = model.score(user, request.context.hour, items, personalised=personalised)
        order = sorted(zip(scores, items, strict=True), key=lambda pair: (-pair[0], pair[1]))
        now = time.time()
        used = {
            "age_s": now - user.as_of_s,
            "inactivity_s": now - user.last_event_s,
            "fallback": None if personalised else "version_mismatch",
        }
        ranked = [{"item_id": item, "score": score} for score, item in order]
        answer = {"items": ranked, "model_version": version, "embeddings": {model.kind: used}}
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("port", "redis", "bundle", "items", "version"):
        parser.add_argument(f"--{name}", required=True)
    found = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(Path(found.bundle), json.loads(Path(found.items).read_text()))
    uvicorn.run(
        make_app(model, found.redis, found.version),
        host="127.0.0.1",
        port=int(found.port),
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
