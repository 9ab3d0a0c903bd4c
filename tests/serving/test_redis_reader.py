"""The Redis reader's connections: as many as look-ups at once, given back, and found again when the server has cut them."""

import asyncio
from contextlib import suppress

import pyarrow as pa
import pytest
import redis

from limaml.config import ServingConfig
from limaml.embeddings.publish import OnlineView
from limaml.features.feature_store import open_store
from serving.features import OnlineFeatures
from serving.store_calls import StoreCalls
from tests import declared
from tests.polling import until

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def stored(make_world, redis_server, tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("redis"), redis=redis_server)
    world.build()
    return world


@pytest.fixture
def client(redis_server):
    host, port = redis_server.split(":")
    with redis.Redis(host=host, port=int(port)) as client:
        yield client


@pytest.fixture
def calls():
    calls = StoreCalls(ServingConfig(store_timeout_s=4.0, breaker_failures=1))
    yield calls
    calls.stop()


def readers(client):
    """Connections whose last command was a reader's."""
    return [int(line["id"]) for line in client.client_list() if line["cmd"] == "hmget"]


async def look_up(online, calls, times):
    found = await asyncio.gather(*(online.read_user("much", calls) for _ in range(times)))
    assert all(fetched.user["gender"] == "F" for fetched in found)


def test_connections_are_kept_and_given_back(online, calls, client):
    async def scene():
        for _ in range(3):
            await look_up(online, calls, 8)
        assert len(readers(client)) == 8
        online.close()
        await until(lambda: not readers(client))

    asyncio.run(scene())


def test_connections_that_the_server_cut_cost_no_look_up(online, calls, client):
    async def scene():
        await look_up(online, calls, 8)
        for number in readers(client):
            client.client_kill_filter(_id=number)
        # The breaker would open at the first failure.
        for _ in range(3):
            await look_up(online, calls, 8)
        assert not calls.breaker.is_open
        online.close()
        await until(lambda: not readers(client))

    asyncio.run(scene())


def test_a_late_answer_leaves_its_connection_in_use(online, client):
    calls = StoreCalls(ServingConfig(store_timeout_s=0.05))

    async def scene():
        await look_up(online, calls, 1)
        [before] = readers(client)
        client.client_pause(300)
        with pytest.raises(TimeoutError):
            await online.read_user("much", calls)
        client.ping()  # is answered when the pause is over

        async def answered():
            while True:
                try:
                    return await look_up(online, calls, 1)
                except TimeoutError:
                    await asyncio.sleep(0)

        await asyncio.wait_for(answered(), 10.0)
        assert before in readers(client)
        online.close()
        await until(lambda: not readers(client))

    asyncio.run(scene())
    calls.stop()


def test_an_answer_is_never_anothers(online, calls, client, stored):
    """A look-up that is cancelled while it waits leaves no answer behind on its connection for the next one."""

    async def scene():
        await look_up(online, calls, 1)
        for user in ("much", "other", "old"):
            client.client_pause(300)
            cancelled = asyncio.ensure_future(online._reader.read(b"another key"))
            for _ in range(100):  # until it was sent: it cannot be answered yet
                await asyncio.sleep(0)
            cancelled.cancel()
            with suppress(asyncio.CancelledError):
                await cancelled
            fetched = await online.read_user(user, calls)
            assert dict(fetched.user) == stored.user_features[user]
        online.close()
        await until(lambda: not readers(client))

    asyncio.run(scene())


@pytest.mark.parametrize("password", ["plain", "p,ss=1", "12345", ' "q" p@ss:w/rd#1% ', "пароль"])
def test_a_password_may_be_any_text(stored, calls, client, monkeypatch, password):
    """Written through Feast's blocking client and read through ours on the loop."""
    monkeypatch.setenv("STORE_PASSWORD", password)
    cfg = stored.cfg.model_copy(update={"feast": stored.cfg.feast.model_copy(update={"online_password": "${STORE_PASSWORD}"})})
    client.config_set("requirepass", password)
    try:
        view = OnlineView(open_store(cfg), declared.USER_FEATURES.name)
        key = view.keys(pa.table({"user_id": ["much"]}))
        view.write(key, view.read(key))
        online = OnlineFeatures(cfg, "blue")
        online.open()

        async def scene():
            await look_up(online, calls, 2)
            online.close()
            await until(lambda: not readers(client))

        asyncio.run(scene())
    finally:
        client.config_set("requirepass", "")
