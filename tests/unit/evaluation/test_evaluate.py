"""A whole judgement on planted rows: what is written, what is compared, what is never read."""

import json
import re
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import roc_auc_score

from limaml import schema
from limaml.errors import DataError, NothingToDo
from limaml.evaluation import evaluate
from limaml.evaluation.console_table import console_table
from limaml.evaluation.daily_replay import score_as_served
from limaml.evaluation.evaluate import ChampionBundle, evaluate_candidate
from limaml.evaluation.evaluate_verb import evaluate_and_register, flat_metrics
from limaml.governance import card
from limaml.metrics import auc
from limaml.models import bundle as bundles
from limaml.registry import DECISION, Registry
from limaml.tasks.protocols import as_served, first_k, query_rows
from limaml.tasks.rows import Rows
from limaml.tasks.sampling import TaskRows, microseconds, support_spec
from limaml.tasks.splits import split_events
from limaml.training.prepare import read_history
from limaml.training.scoring import embed_specs, score_specs
from tests import declared

METHODS = {"item_mean", "user_residual", "global_mlp", "wide_deep", "limaml"}


def test_a_judgement_measures_every_method_on_the_same_rows_and_is_written(make_candidate, monkeypatch):
    cfg, folder, through = make_candidate("one")
    fitted_on, fit = [], evaluate.fit_baselines
    monkeypatch.setattr(evaluate, "fit_baselines", lambda *given: fitted_on.append(given) or fit(*given))
    result = evaluate_candidate(cfg, folder)

    assert result == json.loads((folder / "evaluation.json").read_text())
    assert bundles.load(folder / "bundle").metrics["evaluation"] == result
    assert set(result["first_k"]) == {"0", "2", "5"}
    tables = list(result["first_k"].values())
    assert {(table["rows"], table["users"]) for table in tables} == {(tables[0]["rows"], tables[0]["users"])}
    assert tables[0]["users"] > 5
    for table in [*tables, *result["as_served"].values()]:
        assert set(table["methods"]) == METHODS
    # Item mean and global MLP do not read the support: the same value at every k.
    for method in ("item_mean", "global_mlp"):
        assert len({table["methods"][method]["pooled_auc"] for table in tables}) == 1
    assert len({table["methods"]["limaml"]["pooled_auc"] for table in tables}) == 3
    served = result["as_served"]
    assert served["known"]["rows"] + served["new"]["rows"] == served["all"]["rows"]
    assert sum(table["rows"] for name, table in served.items() if name.startswith("support")) == served["all"]["rows"]

    # As served starts where the last row that anything was chosen on ends.
    logged = read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    later = pc.greater_equal(logged["timestamp"].cast(pa.int64()), split.validation_end_us)
    assert served["all"]["rows"] == pc.sum(later).as_py()
    returning = pc.and_(later, pc.is_in(logged["user_id"], pa.array(split.train_users)))
    assert served["known"]["rows"] == pc.sum(returning).as_py() < pc.sum(later).as_py()
    mine = logged.filter(later)
    rate = np.clip(mine["item_positive_rate"].to_numpy(), 0.02, 0.98)
    assert served["all"]["methods"]["item_mean"]["pooled_auc"] == pytest.approx(roc_auc_score(mine["label"], rate), abs=1e-9)

    # First k are test users' rows. Rivals are fitted on training rows and chosen on validation rows, nothing else.
    rows = TaskRows.from_logged(logged, bundles.load(folder / "bundle").twin.encoder, cfg.task_kind)
    least, n = cfg.evaluation.min_query_rows, cfg.meta.support_rows
    tested = first_k(rows, split.held_out_users, (0, 2, 5), min_query_rows=least, support_rows=n)[0]
    assert (tables[0]["users"], tables[0]["rows"]) == (len(tested), sum(len(spec.query) for spec in tested))
    [(_, training, validator, _)] = fitted_on
    validation = validator.inputs
    for given, expected in ((training, split.train_rows(logged)), (validation, split.validation_rows(logged))):
        assert given.rows.entities == tuple(sorted(set(expected["user_id"].to_pylist())))
        assert len(given.rows.label) == expected.num_rows

    # The gate read these numbers.
    reasons = {check["name"]: check["reason"] for check in result["checks"]}
    network, rival = (served["all"]["methods"][name]["pooled_auc"] for name in ("limaml", "global_mlp"))
    assert f"the global MLP's ({rival:.4f}), got {network:.4f}" in reasons["as_served_auc"]
    gained = result["first_k"]["5"]["methods"]["limaml"]["per_user_auc_vs_global_mlp"]
    assert "got {value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**gained) in reasons["per_user_auc"]


def test_the_page_is_whole_and_loads_nothing(make_candidate):
    cfg, folder, _ = make_candidate("one")
    result = evaluate_candidate(cfg, folder)
    page = (folder / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == 3
    assert not re.search(r"(src|href)='?\"?https?:", page)
    assert not re.search(r"<(script|link)", page)
    for check in result["checks"]:
        assert f">{check['outcome']}<" in page
    value = result["first_k"]["5"]["methods"]["limaml"]["pooled_auc"]
    assert f"{value:.4f}" in page
    assert f"{value:.4f}" in console_table(result)


def test_judging_twice_gives_the_same_numbers(make_candidate):
    cfg, folder, _ = make_candidate("one")
    one, two = evaluate_candidate(cfg, folder), evaluate_candidate(cfg, folder)
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def champion_check(result):
    return next(check for check in result["checks"] if check["name"] == "champion")


def test_a_champion_is_compared_on_rows_that_neither_twin_has_seen(make_candidate):
    cfg, new, through = make_candidate("new", promotion={"min_champion_rows": 10})
    other = {"promotion": {"min_champion_rows": 10}, "training": {"seed": 3}, "meta": {"support_rows": 3}}
    _, old, _ = make_candidate("old", days_less=12, **other)
    ends = [bundles.load(folder / "bundle").lineage["validation_end"] for folder in (old, new)]
    assert ends[0] < ends[1]
    stamps = read_history(cfg, through)["timestamp"]

    def rows_between(first: str, last) -> int:
        before = pc.less(stamps, schema.day_end(last))
        return pc.sum(pc.and_(pc.greater_equal(stamps, pa.scalar(first).cast(schema.TIMESTAMP)), before)).as_py()

    # An older champion: what the candidate itself was chosen on ends last, and decides.
    result = evaluate_candidate(cfg, new, ChampionBundle("7", old / "bundle"))
    check = champion_check(result)
    assert check["outcome"] in ("passed", "failed")
    # How far the two that serve agree stands in the result, among MLflow's figures, on the card and in its headline.
    agreement = result["agreement"]
    assert agreement["champion"] == "7"
    assert agreement["items"]["cosine"] < agreement["items"]["rotated_cosine"] < 1.0
    assert dict(flat_metrics(result))["agreement.embeddings.rotated_cosine"] == agreement["embeddings"]["rotated_cosine"]
    said = json.loads((new / "card.json").read_text())
    shown = f"{agreement['embeddings']['cosine']:.3f}, {agreement['embeddings']['rotated_cosine']:.3f} of"
    assert any(shown in line for line in card.lines(said))
    assert shown in card.headline(said)["limaml.card.agreement"]
    assert "champion 7's twin" in check["reason"]
    assert re.search(
        rf"on the {rows_between(ends[1], through)} rows of all \d+ users from {re.escape(ends[1])}", check["reason"]
    )
    # The champion is scored with the supports of its own configuration.
    theirs, logged = bundles.load(old / "bundle").twin, read_history(cfg, through)
    rows, from_us = TaskRows.from_logged(logged, theirs.encoder, cfg.task_kind), microseconds(datetime.fromisoformat(ends[1]))
    aucs = []
    for n in (3, cfg.meta.support_rows):
        specs = as_served(rows, from_us=from_us, support_rows=n)
        aucs.append(f"({auc(query_rows(rows, specs).labels, score_specs(theirs.network, rows, specs)):.4f})")
    assert aucs[0] in check["reason"]
    assert aucs[1] not in check["reason"]
    # A champion that has seen more than the candidate: its own end decides.
    seen = champion_check(evaluate_candidate(cfg, old, ChampionBundle("8", new / "bundle")))
    count = rows_between(ends[1], through - timedelta(days=12)) or 0
    assert f"from {ends[1]}" in seen["reason"]
    assert str(count) in seen["reason"]
    # The same twin twice is exactly as good as itself.
    same = evaluate_candidate(cfg, new, ChampionBundle("9", new / "bundle"))
    assert "(+0.0000)" in champion_check(same)["reason"]
    assert same["agreement"]["embeddings"]["cosine"] == pytest.approx(1.0)
    assert evaluate_candidate(cfg, new)["agreement"] is None


def test_too_few_later_rows_skip_the_champion(make_candidate):
    cfg, folder, _ = make_candidate("one")
    result = evaluate_candidate(cfg, folder, ChampionBundle("7", folder / "bundle"))
    check = champion_check(result)
    assert check["outcome"] == "skipped"
    assert "needs at least 2000 rows" in check["reason"]
    # The rules are those of whoever judges, not those that the candidate was trained under.
    now = cfg.model_copy(update={"promotion": cfg.promotion.model_copy(update={"min_champion_rows": 2001})})
    check = champion_check(evaluate_candidate(now, folder, ChampionBundle("7", folder / "bundle")))
    assert "needs at least 2001 rows" in check["reason"]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_root": str(folder / "artifacts")}


def test_a_refused_candidate_is_registered_with_its_reasons_and_the_champion_stays(make_candidate, tracking, tmp_path):
    # No refit scores exactly as its twin does.
    cfg, folder, _ = make_candidate("one", registry=tracking, promotion={"max_refit_psi": 1e-9})
    registry = Registry(cfg.registry)
    run_id = registry.start_run("train")
    candidate = json.loads((folder / "candidate.json").read_text())
    (folder / "candidate.json").write_text(json.dumps({**candidate, "run_id": run_id}))
    bundle = {path.name: path.read_bytes() for path in (folder / "bundle").iterdir()}
    with pytest.raises(NothingToDo, match=r"candidate version 1 was refused: .*refit_psi: "):
        evaluate_and_register(cfg, folder)
    # Beside the pages the candidate is as training left it; the judgement is in the bundle that was registered.
    assert {path.name: path.read_bytes() for path in (folder / "bundle").iterdir()} == bundle
    assert {"evaluation.json", "report.html"} <= {path.name for path in folder.iterdir()}
    registered = bundles.load(registry.download("1", tmp_path / "registered"))
    assert registered.metrics["evaluation"]["decision"] == "refused"
    version = registry.get("1")
    assert version.tags[DECISION] == "refused"
    assert "refit_psi" in version.tags["limaml.reasons"]
    assert registry.champion() is None
    with pytest.raises(NothingToDo, match="candidate version 1 was refused"):  # judged again: updated, not doubled
        evaluate_and_register(cfg, folder)
    assert len(registry.versions()) == 1
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=cfg.registry.tracking_uri)
    assert "first_k.5.limaml.pooled_auc" in client.get_run(run_id).data.metrics
    assert {"evaluation.json", "report.html"} <= {file.path for file in client.list_artifacts(run_id)}


def test_score_as_served_equals_the_plain_way(make_candidate):
    """Row by row: embed the user's last rows before the day, score the row alone; in whatever order the rows are given."""
    cfg, folder, through = make_candidate("one")
    model = bundles.load(folder / "bundle").refit
    logged = read_history(cfg, through)
    at_day = pc.greater_equal(logged["timestamp"], schema.day_start(through))
    day_rows, history = logged.filter(at_day), logged.filter(pc.invert(at_day))
    shuffled = day_rows.take(np.random.default_rng(0).permutation(day_rows.num_rows))
    scores = score_as_served(model.network, model.encoder, shuffled, history, day=through, cfg=cfg)
    assert len(scores) > 5
    rows = TaskRows.from_logged(history, model.encoder, cfg.task_kind)
    for row, score in zip(shuffled.to_pylist(), scores, strict=True):
        entity = rows.position(row["user_id"])
        embedding = model.network.priors()["user"][None]
        if entity is not None:
            spec = support_spec(rows, entity, schema.day_start(through), cfg.meta.support_rows)
            embedding = embed_specs(model.network, rows, [spec])
        encoded = model.encoder.encode_table(pa.Table.from_pylist([row], schema=declared.LOGGED_EVENTS.arrow))
        logit = float(model.network(Rows.from_encoded(encoded), {"user": embedding}).detach())
        assert score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)


def test_score_as_served_refuses_rows_of_another_day(make_candidate):
    cfg, folder, through = make_candidate("one")
    model = bundles.load(folder / "bundle").refit
    logged = read_history(cfg, through)
    with pytest.raises(
        DataError, match=rf"rows of day {through} must lie within it, got \d+ of {logged.num_rows} rows that do not"
    ):
        score_as_served(model.network, model.encoder, logged, logged.slice(0, 0), day=through, cfg=cfg)


def test_score_as_served_takes_a_day_from_its_first_instant_to_before_its_end(make_candidate):
    cfg, folder, through = make_candidate("one")
    model = bundles.load(folder / "bundle").refit
    one = read_history(cfg, through).slice(0, 1)
    start, end, tick = schema.day_start(through), schema.day_end(through), timedelta(microseconds=1)

    def at(instant):
        number = one.schema.get_field_index("timestamp")
        return one.set_column(number, one.schema.field(number), pa.array([instant], schema.TIMESTAMP))

    def score(day_rows, history):
        return score_as_served(model.network, model.encoder, day_rows, history, day=through, cfg=cfg)

    for inside in (start, end - tick):
        assert score(at(inside), at(start - tick)).shape == (1,)
    for outside in (start - tick, end):
        with pytest.raises(DataError, match=f"rows of day {through} must lie within it, got 1 of 1 rows"):
            score(at(outside), one.slice(0, 0))
    with pytest.raises(DataError, match=f"history before day {through} must lie within it, got 1 of 1 rows"):
        score(at(start), at(start))
