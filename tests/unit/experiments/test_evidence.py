"""The evidence of one small world: every method is judged on the same rows, divided by who asks, and the tables say so."""

import json
from datetime import date, timedelta
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

from experiments.cached_jobs import Job, JobOutput
from experiments.evidence import groups, jobs, reliability, report
from experiments.evidence.answers import SIDES, Answers
from experiments.evidence.arms import ARMS, RIVALS, SEQUENCE_MODEL, SHIPPABLE, VECTORS, WITHOUT, configured
from experiments.evidence.fit_data import FitData
from experiments.evidence.measure import METRICS, PER_VISIT, Part, ndcgs
from experiments.evidence.run import beside, seeds_of
from experiments.evidence.run import measured as measure_world
from experiments.evidence.titles import name_of
from experiments.evidence.worlds import ABOUT, RETURNING, Origin, evidence_worlds, ingested, origins
from experiments.results import plain
from experiments.transfer_jobs import WORLDS, World
from limaml.config import Config, load
from limaml.metrics import draw_users
from limaml.tasks.sampling import MICROSECONDS_PER_DAY

SOURCE = RETURNING | {
    "synthetic_users": 60,
    "synthetic_items": 20,
    "synthetic_days": 24,
    "synthetic_rows_per_user": 60,
    "synthetic_label_rate": 0.4,
}
FEATURELESS = {*RIVALS["rules"], "truth"} - {"own_rate"}
DAILY_FIT = "shipped, retrained daily"
WEEKLY_FIT = [f"{name}, retrained weekly" for name in RIVALS["networks"]]
BY_ITEM = {"entity": "user", "name": "same", "type": "number", "aggregate": "rate", "by": "item_id"}


def small_world():
    training = ["training.max_steps=4", "training.validate_every=2", "training.tasks_per_step=8", "evaluation.baseline_steps=2"]
    shares = ["evaluation.held_out=hash", "evaluation.train_share_of_days=0.7", "evaluation.validation_share_of_days=0.15"]
    cfg = load("configs/synthetic.toml", [*(f"source.{key}={value}" for key, value in SOURCE.items()), *training, *shares])
    values = cfg.model_dump(mode="json")
    return Config.model_validate(values | {"features": [*values["features"], BY_ITEM]})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    rivals = [job for job in RIVALS if job != SEQUENCE_MODEL]  # It has an environment of its own, and a test of its own.
    options = {"arms": list(ARMS), "rivals": rivals, "num_origins": 2, "seeds": 1, "workers": 2, "console": Console(quiet=True)}
    options |= {"retrained": [DAILY_FIT, "networks, retrained weekly"]}
    found = measure_world(small_world(), "drifting", root=tmp_path_factory.mktemp("evidence"), **options)
    return json.loads(json.dumps(plain(found), allow_nan=False))


def test_every_method_is_there_with_and_without_history(measured):
    methods = set(measured["methods"])
    rivals = {name for job, names in RIVALS.items() if job != SEQUENCE_MODEL for name in names}
    assert methods >= {*ARMS, *rivals, "truth", *(f"{arm}{WITHOUT}" for arm in ARMS), f"global_mlp{WITHOUT}"}
    assert f"own_rate{WITHOUT}" not in methods, "it is made of what is left out"
    assert set(measured["validation"]) == {*ARMS, *(f"{arm}{WITHOUT}" for arm in ARMS)}


def test_gains_are_the_chosen_arm_less_the_others(measured):
    for side in ("", "_without_history"):
        key, ours = f"gains{side}", measured[f"chosen{side}"]
        for group in ("served_returning", "served_new", "first_k20"):
            for metric in METRICS:
                value = measured["methods"][ours][group][metric]
                assert len(measured[key][group][metric]) > 5
                for rival, gain in measured[key][group][metric].items():
                    assert gain["mean"] == pytest.approx(value - measured["methods"][rival][group][metric], abs=2e-3)
                    assert gain["low"] <= gain["mean"] <= gain["high"]
                    assert ("by_day" in gain) == (metric != "per_user_auc")
                    assert rival.endswith(WITHOUT) == ours.endswith(WITHOUT) or rival in FEATURELESS


def test_nobody_is_better_than_what_the_labels_were_drawn_by(measured):
    best = measured["methods"]["truth"]["served_all"]["pooled_auc"]
    assert best > 70
    assert all(of["served_all"]["pooled_auc"] < best for title, of in measured["methods"].items() if title != "truth")


def test_groups_are_those_of_who_asks(measured):
    rows = {name: group["rows"] for name, group in measured["groups"].items()}
    returning = rows["served_returning"]
    assert 0 < returning < rows["served_all"]
    for what in ("visits before", "days away", "days known"):
        assert sum(number for name, number in rows.items() if name.startswith(what)) == returning
    assert 0 < sum(number for name, number in rows.items() if name.startswith("taste")) <= returning


def test_without_rows_there_is_the_prior(measured):
    of = measured["first_visits"][measured["chosen"]]
    assert set(of) == {str(k) for k in jobs.KS}
    assert "over_prior" not in of["0"]
    assert [len(of[str(k)]["over_prior"]) for k in jobs.KS[1:]] == [2] * (len(jobs.KS) - 1), "one for each origin"
    assert all(one["low"] <= one["mean"] <= one["high"] for part in of["20"]["over_prior"] for one in part.values())


def test_older_embeddings_are_held_against_daily_ones(measured):
    cadences = measured["staleness"]["shipped"]
    assert set(cadences) == {*jobs.CADENCES, jobs.NEVER}
    assert cadences["daily"]["served_returning"]["over_daily"][PER_VISIT]["mean"] == 0
    assert cadences["never"]["served_returning"]["over_daily"][PER_VISIT]["mean"] != 0


def test_whole_lists_are_ranked_by_whoever_needs_no_other_users_rows(measured):
    ranked = {title for title, of in measured["methods"].items() if "whole_catalogue" in of}
    left_out = {"truth", "popular_lately", "item", "both", DAILY_FIT, *WEEKLY_FIT}
    assert ranked.isdisjoint(left_out)
    assert ranked >= {*ARMS, *RIVALS["networks"], "bought_before"} - left_out
    assert all(0 <= measured["methods"][title]["whole_catalogue"]["hit10"] <= 100 for title in ranked)
    assert measured["groups"]["whole_catalogue"]["rows"] > measured["groups"]["served_returning"]["rows"]


def test_rows_of_the_other_half_are_held_against_earlier_ones(measured):
    assert {*measured["halves"]} == {"shipped", f"shipped{WITHOUT}"}
    of = measured["halves"]["shipped"]
    assert of["past"][PER_VISIT] != of["future"][PER_VISIT]


def test_a_half_is_half_of_the_judged_days(tmp_path):
    at = Origin.read(*origins(ingested(small_world(), tmp_path / "small"), 1)[0])
    rows = FitData(at.cfg, at).test.rows
    specs = jobs.judged_tasks(at.cfg, rows, at.split, every_cadence=False, halves=True)["halves", "future"]
    day_R = (rows.timestamp_us - at.split.validation_end_us) // MICROSECONDS_PER_DAY
    asked = {day for spec in specs for day in day_R[spec.query].tolist()}
    seen = {day for spec in specs for day in day_R[spec.support_start : spec.support_stop].tolist()}
    assert (asked, seen) == ({0, 1}, {2, 3})


def test_the_simplest_that_validates_within_a_tenth_is_chosen_with_history_and_without():
    values = {True: {"shipped": 0.7, "newton": 0.7005, "paper": 0.7012}, False: {"shipped": 0.6, "newton": 0.7, "set": 0.7009}}
    outputs = {
        (history, arm): [[JobOutput({"validation": value + by})] for by in (-0.1, 0.1)]
        for history, of in values.items()
        for arm, value in of.items()
    }
    assert Answers([], outputs).chosen == {"": "newton", "_without_history": f"newton{WITHOUT}"}


def test_what_is_left_unexplained_is_said_with_history_and_without(measured):
    assert set(measured["repeats"]) == {"global_mlp", f"global_mlp{WITHOUT}"}
    assert all(
        set(of) == {"level", "taste"} and of["level"]["low"] <= of["level"]["mean"] for of in measured["repeats"].values()
    )


def test_vectors_of_texts_lie_in_a_storage_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(WORLDS, "small", World("synthetic", "{title}", 4, offered=True, overrides=()))
    ((cfg, through),) = origins(ingested(small_world(), tmp_path / "small"), 1)
    params = {"history": True, "seed": 0, "through": str(through), "config": cfg.model_dump_json()}
    plain, with_text = (jobs.run(Job("evidence", arm, {**params, "arm": arm})).arrays for arm in ("shipped", "vectors"))
    assert np.array_equal(plain["served"], with_text["served"])
    assert not np.array_equal(plain["served|daily|shipped"], with_text["served|daily|vectors"])
    assert np.isfinite(with_text["lists|daily|vectors"]).all()
    assert (tmp_path / "small-vectors" / "embedded" / "text_vector").is_dir()
    assert not (tmp_path / "small" / "embedded").exists()
    assert not configured(load("configs/kuairand.toml"), VECTORS, history=True, seed=0).transfer, "a video has no text"


@pytest.mark.parametrize(("every", "days"), [("daily", [1, 1, 1, 1]), ("weekly", [4])])
def test_what_is_fitted_anew_validates_on_what_came_last(tmp_path, monkeypatch, every, days):
    ((cfg, through),) = origins(ingested(small_world(), tmp_path / "small"), 1)
    run, asked = jobs.run, []
    monkeypatch.setattr(jobs, "run", lambda job: asked.append(job.params) or run(job))
    params = {"arm": f"rules, retrained {every}", "history": True, "seed": 0, "through": str(through)}
    params["config"] = cfg.model_dump_json()
    found = run(Job("evidence", "retrained", params)).arrays
    fits = [(Config.model_validate_json(each["config"]).evaluation, date.fromisoformat(each["through"])) for each in asked]
    assert [(last - at.test_from).days + 1 for at, last in fits] == days
    assert {(at.test_from - at.validate_from).days for at, _ in fits} == {7 if every == "weekly" else 1}
    assert (fits[0][0].test_from, fits[-1][1]) == (through - timedelta(days=3), through)
    served = {key for key in found if key.startswith("served|")}
    assert served == {f"served|daily|{name}, retrained {every}" for name in (*RIVALS["rules"], "truth")}
    assert all(len(found[key]) == len(found["served"]) for key in served)


def test_what_is_fitted_anew_is_judged_on_the_same_rows(measured):
    methods = measured["methods"]
    assert methods["shipped"]["served_returning"] != methods[DAILY_FIT]["served_returning"]
    assert all(set(methods[title]) == {"served_all", "served_returning", "served_new"} for title in (DAILY_FIT, *WEEKLY_FIT))


def test_only_what_a_seed_changes_is_run_with_several():
    assert [seeds_of(job, 3) for job in ("shipped", "sequence_model", "rules", "tables", DAILY_FIT)] == [3, 3, 1, 1, 1]


def test_named_jobs_are_put_beside_what_is_chosen(measured, tmp_path):
    measure = partial(measure_world, small_world(), "drifting", workers=2, root=tmp_path, console=Console(quiet=True))
    arms = {f"chosen{side}": measured[f"chosen{side}"].removesuffix(end) for side, end in SIDES.items()}
    arm = next(arm for arm in ("gradient", "set", "hybrid") if arm not in arms.values())
    lost = {**measured, "methods": {k: v for k, v in measured["methods"].items() if k.removesuffix(WITHOUT) != arm}}
    found = beside(small_world(), lost, [arm], measure)
    assert arm in found["methods"].keys() - lost["methods"].keys()
    parts = ("methods", "gains", "gains_without_history", "groups", "first_visits", "staleness", "validation")
    assert {part: found[part] for part in parts} == {part: measured[part] for part in parts}
    worst = min((arm for arm in SHIPPABLE if arm in measured["validation"]), key=measured["validation"].get)
    with pytest.raises(ValueError, match="would change chosen"):
        beside(small_world(), measured | {"chosen": worst}, [measured["chosen"]], measure)


def test_an_arm_is_chosen_by_the_mean_of_its_seeds():
    seeds = {"shipped": [0.80, 0.70], "newton": [0.78, 0.78]}
    of = {(True, arm): [[JobOutput({"validation": value}) for value in values]] for arm, values in seeds.items()}
    assert Answers([], of).validation == pytest.approx({"shipped": 0.75, "newton": 0.78})
    assert Answers([], of).chosen == {"": "newton"}


def test_the_report_has_every_table_and_picture(measured, tmp_path):
    report.write({"drifting": measured}, tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert all(f"({name}.png)" in text and (tmp_path / f"{name}.png").stat().st_size > 1000 for name in report.PICTURES)
    assert text.count("### ") == 8
    assert all(name_of(title) in text for title in measured["methods"] if title in measured["gains"]["served_all"][PER_VISIT])


def test_visits_and_days_are_counted_of_all_earlier_days():
    logged = pa.table(
        {
            "user_id": ["a", "b", "a", "a", "a", "b"],
            "timestamp": pa.array([0, 0, 3, 3, 5, 40], pa.timestamp("s", tz="UTC")),
            "label": pa.array([0, 1, 0, 1, 1, 0], pa.int8()),
        }
    )
    stamps = pc.multiply(logged["timestamp"].cast(pa.int64()), 86_400_000_000)
    logged = logged.set_column(1, "timestamp", stamps.cast(pa.timestamp("us", tz="UTC")))
    before, away, known = groups.visits(logged, pa.array(["b", "a"]))
    assert before.tolist() == [0, 0, 1, 1, 2, 1]
    assert away.tolist() == [0, 0, 3, 3, 2, 40]
    assert known.tolist() == [0, 0, 3, 3, 5, 40]


def test_the_mean_of_visits_is_drawn_by_user_and_by_day():
    labels, scores = np.array([0.0, 1, 0, 1, 0, 1]), np.array([0.1, 0.9, 0.9, 0.1, 0.2, 0.8])
    part = Part(labels, np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1, 1]))
    weights = draw_users(2, draws=50, seed=0)
    by_user, by_day = (part.measured(scores, weights, by_day=each, pooled=False) for each in (False, True))
    assert by_user[PER_VISIT][0] == by_day[PER_VISIT][0] == pytest.approx(200 / 3), "1, 0 and 1"
    a, b = weights.T
    assert by_user[PER_VISIT][1] == pytest.approx(100 * (a + b) / (2 * a + b))
    assert by_day[PER_VISIT][1] == pytest.approx(100 * (a + b) / (a + 2 * b))
    assert "per_user_auc" not in by_day


def test_ndcg_is_that_of_each_list():
    """By hand: the second list's positive is third, the third list has nothing to rank."""
    labels, scores = np.array([1.0, 0, 0, 0, 1, 1, 1]), np.array([0.9, 0.1, 0.9, 0.8, 0.1, 0.5, 0.4])
    found = ndcgs(labels, scores, np.array([0, 0, 1, 1, 1, 2, 2]))
    assert found[:2] == pytest.approx([1.0, 1 / np.log2(4)])
    assert np.isnan(found[2])


def test_an_earlier_origin_ends_where_the_next_one_is_judged(tmp_path):
    """By shares of the days and, where dates are given, by those moved."""
    world = evidence_worlds()["drifting"]
    world = world.model_copy(update={"storage": world.storage.model_copy(update={"root": str(tmp_path)})})
    (_, last), (_, before) = origins(world, 2)
    assert (last - before).days == round(40 * (1 - 0.8 - 0.1))
    dates = {"validate_from": last - timedelta(days=5), "test_from": last - timedelta(days=1)}
    dated = world.model_copy(update={"evaluation": world.evaluation.model_copy(update=dates)})
    (_, last), (moved, before) = origins(dated, 2)
    assert before == last - timedelta(days=2)
    assert moved.evaluation.test_from == last - timedelta(days=3)
    assert set(ABOUT) == set(evidence_worlds("/data/kuairand"))


def test_what_is_left_unexplained_repeats_as_much_as_users_differ():
    """Users' levels have a standard deviation of 0.2 under noise of 1, so that 80 rows are reliable to 80 / (80 + 25)."""
    rng, num_users, days, rows = np.random.default_rng(0), 4000, 4, 20
    user, day = np.repeat(np.arange(num_users), days * rows), np.tile(np.repeat(np.arange(days), rows), num_users)
    category = rng.integers(0, 2, len(user))
    level, noise = 0.2 * rng.normal(size=num_users), rng.normal(size=len(user))
    part, weights = Part(noise, user, day), draw_users(num_users, draws=200, seed=0)
    found = reliability.repeats(part, np.zeros(len(user)), category, weights)
    assert abs(found["level"][0]) < 0.1
    assert abs(found["taste"][0]) < 0.1
    value, draws = reliability.repeats(Part(noise + level[user], user, day), np.zeros(len(user)), category, weights)["level"]
    assert value == pytest.approx(80 / 105, abs=0.03)
    assert np.quantile(draws, 0.025) < value < np.quantile(draws, 0.975)
    taste = 0.2 * rng.normal(size=(num_users, 2))[user, category]
    found = reliability.repeats(Part(noise + taste, user, day), np.zeros(len(user)), category, weights)
    assert 0.5 < found["taste"][0] < 0.75, "40 rows a category less the level, which holds half of it"


def test_halves_that_contradict_each_other_have_the_least_reliability():
    """However a draw's few users round."""
    num_users, days, rows = 5, 2, 40
    user, day = np.repeat(np.arange(num_users), days * rows), np.tile(np.repeat(np.arange(days), rows), num_users)
    label = np.where(day == 0, 1.0, -0.3) * np.random.default_rng(0).normal(size=num_users)[user]
    weights = draw_users(num_users, draws=500, seed=0)
    value, draws = reliability.repeats(Part(label, user, day), np.zeros(len(user)), np.zeros(len(user), int), weights)["level"]
    assert value == -1.0
    assert (draws[~np.isnan(draws)] == -1.0).all()
