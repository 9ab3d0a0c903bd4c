"""The floor of what BentoML costs: a service that reads the same request and returns a constant.

Tuned as ours is (one worker, an async endpoint, no access log, a short timeout, garbage of the start set aside), it parses the
body into a model of two fields and answers with one of one field. It looks nothing up, scores nothing and returns no items, so
whatever ours does beyond being a BentoML service counts against ours.
"""

import gc
from typing import Any

import bentoml
from pydantic import BaseModel

TIMEOUT_S = 5.0


class Request(BaseModel):
    user_id: str
    item_ids: list[str]


class Answer(BaseModel):
    ok: bool


_ANSWER = Answer(ok=True)


@bentoml.service(name="noop", workers=1, traffic={"timeout": TIMEOUT_S}, logging={"access": {"enabled": False}})
class Noop:
    @bentoml.on_startup  # type: ignore[untyped-decorator]
    def start(self) -> None:
        gc.collect()
        gc.freeze()

    @bentoml.api(route="/rank", output_spec=Answer)  # type: ignore[untyped-decorator]
    async def rank(self, request: Request, /) -> Any:  # noqa: ARG002 - parsed is all that it is to be
        return _ANSWER
