"""Training and adapting on a Ray cluster of a head and three nodes, by the command line: the same as without one."""

import json
import os
import subprocess
import sys
from datetime import UTC, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from limaml import schema
from limaml.config import Config
from limaml.embeddings.adapt_on_ray import divide
from limaml.events.logged import write_logged
from limaml.io.storage import Storage
from limaml.models import bundle as bundles
from limaml.tasks.splits import split_events
from limaml.training.prepare import fit_encoders, load_training_data, read_history
from limaml.training.step import Workers
from limaml.training.twin_and_refit import train_twin_and_refit
from tests import declared
from tests.contracts.embedding_world import World, files
from tests.servers import RayCluster, ray_cluster
from tests.unit.conftest import make_logged
from tests.unit.training.gradient_of_worker import gradient

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
NUM_NODES = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with ray_cluster(tmp_path_factory.mktemp("ray"), num_nodes=NUM_NODES, cpus=2) as running:
        yield running


def on(cluster: RayCluster, cfg: Config, *, from_elsewhere: bool = False, **settings: object) -> Config:
    address = cluster.client_address if from_elsewhere else cluster.address
    ray = {"address": address, "token_file": str(cluster.token_file), **settings}
    return cfg.model_copy(update={"ray": cfg.ray.model_copy(update=ray)})


def limaml(cfg: Config, folder: Path, *arguments: object) -> tuple[dict, str]:
    """The verb's result and its log."""
    config, result = folder / "verb.config.json", folder / "verb.result.json"
    config.write_text(cfg.model_dump_json())
    command = [sys.executable, "-m", "limaml.cli", *map(str, arguments), "--config", str(config), "--result", str(result)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(result.read_text()), log


def test_a_fill_and_a_day_are_the_same_bytes_on_the_cluster(cluster, tmp_path):
    """Asked from elsewhere, as Airflow's pods do."""
    world = World(tmp_path)
    cfg = on(cluster, world.cfg, from_elsewhere=True)
    version = world.new_version(0)
    plan = world.fill(version)
    view = schema.embedding_view("user", plan["slot"])
    alone, online = files(tmp_path / "data" / "embeddings"), world.online(view)
    assert any(path.endswith("shard-000.parquet") for path in alone)
    for shard in plan["shards"]:
        (tmp_path / "data" / "embeddings" / f"kind=user/version={version}/dt={world.last}/shard-{shard:03d}.parquet").unlink()
        result, log = limaml(cfg, tmp_path, "fill", "--version", version, "--shard", shard)
        assert "adapting_on_cluster" in log
        assert result["written"] == 0, "what is online is these very rows"
    assert files(tmp_path / "data" / "embeddings") == alone
    assert world.online(view) == online

    limaml(world.cfg, tmp_path, "cut-over", "--version", version)
    day = world.next_day()
    result, _ = limaml(world.cfg, tmp_path, "adapt", "--day", day)
    [path] = map(Path, result["paths"])
    expected = path.read_bytes()
    path.unlink()
    _, log = limaml(cfg, tmp_path, "adapt", "--day", day)
    assert "adapting_on_cluster" in log
    assert path.read_bytes() == expected


def test_a_connection_whose_server_does_not_start_is_tried_again_and_then_named(tmp_path):
    """The head gives the process that it starts for a connection no time at all."""
    never = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "0"}
    with ray_cluster(tmp_path, num_nodes=0, environment=never) as running:
        cfg = on(running, planted(tmp_path), from_elsewhere=True)
        script = tmp_path / "connect.py"
        script.write_text(
            "import sys\nfrom limaml.config import load\nfrom limaml.io.cluster import connected\n"
            "with connected(load(sys.argv[1])):\n    pass\n"
        )
        config = tmp_path / "config.json"
        config.write_text(cfg.model_dump_json())
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, script, config], env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert said.count("ray_client_server_not_started") == 2
    assert f"the Ray cluster at {running.client_address} must answer, it does not" in said


def test_parts_are_whole_batches_and_every_entity_is_in_one():
    entities = [f"e{number:03d}" for number in range(101)]
    for batch, most, tasks in ((10, 1000, 4), (10, 25, 4), (10, 5, 1), (7, 1000, 3), (200, 1000, 4)):
        parts = divide(entities, batch, most, tasks)
        assert [entity for part in parts for entity in part] == entities
        assert all(len(part) % batch == 0 for part in parts[:-1])
        assert all(len(part) <= max(batch, most) for part in parts)
        assert len(parts) <= tasks or max(len(part) for part in parts) > most - batch


def planted(tmp_path: Path, **sections: dict) -> Config:
    values = {
        "features": declared.FEATURES,
        "source": {"kind": "synthetic"},
        "storage": {"root": str(tmp_path / "data")},
        "model": {"embedding_dim": 4, "global_hidden": [16], "dropout": 0.0},
        "meta": {"support_rows": 12, "query_rows": 8},
        "training": {"num_workers": 3, "tasks_per_step": 12, "max_steps": 10, "validate_every": 5, "checkpoint_every": 5},
        "evaluation": {"held_out": "late", "first_k": [0, 2, 5], "bootstrap_draws": 50, "baseline_steps": 20},
        "promotion": {"protocol": "first_k", "gate_k": 5},
        "registry": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_root": str(tmp_path / "artifacts")},
        "local": {"run_root": str(tmp_path / "run")},
    }
    for name, section in sections.items():
        values[name] |= section
    values["training"]["storage_path"] = str(tmp_path / "results")
    return Config.model_validate(values)


def test_three_nodes_have_the_gradient_of_one_process(cluster, tmp_path):
    cfg, logged = planted(tmp_path), make_logged()
    tasks, flat, loss = gradient(cfg, logged, Workers())
    (tmp_path / "config.json").write_text(on(cluster, cfg).model_dump_json())
    pq.write_table(logged, tmp_path / "logged.parquet")
    command = [sys.executable, "-m", "tests.engines.train_on_nodes", str(NUM_NODES), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_NODES)]
    assert len({node for *_, node in found}) == NUM_NODES
    for rank, (mine, theirs, their_loss, size, _) in enumerate(found):
        assert (mine, size) == (tasks[rank::NUM_NODES], NUM_NODES)
        # float64 sums in another order: 1e-12 is far above rounding, far below any re-weighting of a task.
        assert theirs == pytest.approx(flat, abs=1e-12, rel=0)
        assert their_loss == pytest.approx(loss, abs=1e-12, rel=0)
    assert max(map(abs, flat)) > 1e-3


def test_a_candidate_of_as_many_workers_as_there_is_room_for_is_that_of_one_process(cluster, tmp_path):
    """Six processors for twelve workers: elastic training starts with six."""
    cfg = planted(tmp_path, training={"num_workers": 12})
    logged, storage = make_logged(), Storage(cfg.storage.root)
    first, last = (value.as_py().astimezone(UTC).date() for value in pc.min_max(logged["timestamp"]).values())
    for number in range((last - first).days + 1):
        day = first + timedelta(days=number)
        stamps = logged["timestamp"]
        within = pc.and_(pc.greater_equal(stamps, schema.day_start(day)), pc.less(stamps, schema.day_end(day)))
        write_logged(storage, day, logged.filter(within), 1)
    result, _ = limaml(on(cluster, cfg, min_workers=2), tmp_path, "train", "--through", last)
    bundle = bundles.load(Path(ROOT / result["candidate"]) / "bundle")
    assert list((tmp_path / "results").iterdir()) == [], "the run's folder is removed"

    history = read_history(cfg, last)
    data = load_training_data(cfg, last, *fit_encoders(cfg, history, split_events(history, cfg.evaluation)))
    alone = train_twin_and_refit(cfg, data, Workers(), torch.device("cpu"), resume=None, save=lambda state: None)
    for weights, network in ((alone.twin, bundle.twin.network), (alone.network, bundle.refit.network)):
        for name, value in network.state_dict().items():
            # float32 sums over workers in another order, carried through ten AdamW steps.
            torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3)
