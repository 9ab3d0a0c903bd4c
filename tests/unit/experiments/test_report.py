"""The report and the page of results say what a results mapping carries, and no more."""

import json

import pytest

from experiments import report
from experiments.reporting import claims, gains, text
from experiments.results import plain, read, write
from tools import figures, pages

KS = ("0", "1", "2", "3", "5", "10", "20", "50")
GROUPS = ("all", "returning", "new", "frequent", "infrequent")
METHODS = (*text.RIVALS, "stored", "full", "history", "row_mlp", "id_mlp")
CADENCES = tuple(text.CADENCES)
TABLES = ("methods", "sensitivity", "recovery", "drift", "cost")


def interval(mean, half=0.004):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def methods_part():
    every = (*METHODS, "prior")
    found = {"protocol": {"origins": [_origin(100), _origin(200)], "ks": [int(k) for k in KS], "draws": 2000, "seeds": 3}}
    for name, value in {"auc": 0.72, "peruser_auc": 0.69, "log_loss": 0.61, "calibration_error": 0.02}.items():
        found[name] = {m: {k: value + 0.001 * int(k) ** 0.5 for k in KS} for m in every}
        found[f"as_served_{name}"] = {m: dict.fromkeys(GROUPS, value) for m in every}
    for metric in ("auc", "peruser_auc"):
        of = {ours: [rival for rival in every if rival != ours] for ours in text.OURS}
        found[f"delta_{metric}"] = {o: {r: {k: interval(0.025) for k in (*KS, "20+")} for r in rs} for o, rs in of.items()}
        for name, groups in {"frequency": ("frequent", "infrequent"), "as_served": GROUPS}.items():
            found[f"{name}_delta_{metric}"] = {o: {r: {g: interval(0.001) for g in groups} for r in rs} for o, rs in of.items()}
        found["delta_" + metric]["full"]["row_mlp"]["20+"] = interval(0.001, 0.0005)
        found[f"refresh_{metric}_by_method"] = {m: _by_cadence(0.7) for m in every}
    found["few_rows"] = {k: {m: [interval(0.0, 0.002)] * 2 for m in ("auc", "peruser_auc")} for k in KS[:5]}
    not_daily = [c for c in CADENCES if c != "daily"]
    found["refresh_delta"] = {
        m: {c: {g: interval(-0.01) for g in GROUPS[:2]} for c in not_daily} for m in ("auc", "peruser_auc")
    }
    return found | {"refresh_auc": found["refresh_auc_by_method"]["stored"]}


def _origin(users):
    numbers = {"train_users": 400, "train_rows": 40000, "validation_users": 50, "test_users": users, "first_k_users": users}
    return numbers | {"first_k_rows": 9000, "served_rows": 15000, "served_returning_rows": 1500}


def _by_cadence(first):
    return {c: {"all": first + 0.01 * at, "returning": first + 0.01 * at} for at, c in enumerate(CADENCES)}


def sensitivity_part():
    cells = []
    for order, learned, outer in (("second", True, 0.003), ("second", False, 0.003), ("first", True, 0.003)):
        for steps in (1, 3, 5, 10):
            for rate in (0.3, 1.0, 3.0):
                setting = {"order": order, "learned": learned, "outer_rate": outer, "inner_steps": steps, "inner_rate": rate}
                values = {"validation_auc": 0.7 + 0.001 * steps * rate, "pooled": 0.71, "peruser": 0.7}
                cells.append(setting | values | {"diverged": 0.0, "best_step": 100.0, "train_seconds": 4.0 * steps})
    cells[-1] |= {"diverged": 1.0, "validation_auc": 0.5, "train_seconds": 0.0}
    return {"sensitivity": cells}


def recovery_part():
    ks = ("1", "2", "5", "10", "20", "50", "100", "200")
    aucs = {k: {"limaml": 0.65, "oracle": 0.66, "none": 0.6, "share": 0.85} for k in ks}
    taste = {"0": {"limaml": 0.6, "oracle": 0.6, "none": 0.6}} | aucs
    recovery = dict.fromkeys(("level", "one_dimension", "ten_dimensions"), taste)
    level = {k: {name: value for name, value in cell.items() if name != "share"} for k, cell in taste.items()}
    shares = {"recovered_share": {k: aucs[k]["share"] for k in ks}, "recovery_peruser": recovery | {"level": level}}
    return {"recovery": recovery, **shares}


def drift_part():
    aucs = {name: _by_cadence(0.6) for name in ("limaml", "user_level", "none", "truth")}
    one = {"delta": 0.1, "auc": aucs, "peruser_auc": aucs, "support_rows": [16, 64, 16]}
    scales = {"none": None, "slow": 60.0, "medium": 10.0, "fast": 2.0}
    return {"synthetic_drift": {scale: {"half_life_days": days, **one} for scale, days in scales.items()}}


def cost_part():
    def cell(steps, dim, hidden):
        values = {"train_step_ms": 2.0 + steps, "train_step_full_ms": 3.0 + steps, "adapt_us": 20.0 + steps}
        sizes = {"stored_bytes": 4 * dim + 48, "adapted_bytes": 40 * dim + 48}
        times = {"score_stored_us": 90.0, "score_full_us": 120.0}
        return {"inner_steps": steps, "embedding_dim": dim, "hidden": hidden} | values | sizes | times

    cells = {(3, 33), (3, 65), *((steps, 17) for steps in (0, 1, 3, 5, 10))}
    blocks = {"task_vector": None, "id_mlp": 32, "row_mlp": 32}
    return {"cost": {block: [cell(*each, hidden) for each in sorted(cells)] for block, hidden in blocks.items()}}


PARTS = (methods_part, sensitivity_part, recovery_part, drift_part, cost_part)


@pytest.fixture
def results():
    """All tables, with round figures in which every claim holds."""
    designs = {m: {"design": {"overrides": []}, "validation": 0.7, "configurations": 24} for m in METHODS}
    designs["stored"] = {"design": {"overrides": ["meta.inner_steps=3"]}, "validation": 0.719, "configurations": 24}
    found = {"quick": False, "minutes": 90.0, "tables": list(TABLES), "designs": designs, "units": {"auc": "0 to 1"}}
    found["configurations"] = {name: design["configurations"] for name, design in designs.items()}
    for part in PARTS:
        found |= part()
    return found


def verdicts(results):
    return {claim.text: claim.holds for claim in claims.claims(results)}


def of(results, *words):
    found = [claim for claim in claims.claims(results) if all(word in claim.text for word in words)]
    assert len(found) == 1
    return found[0]


def test_every_claim_of_these_results_holds(results):
    assert len(verdicts(results)) == 11
    assert set(verdicts(results).values()) == {True}


def test_a_gain_whose_interval_includes_zero_does_not_hold_though_its_mean_reaches_the_goal(results):
    results["delta_peruser_auc"]["stored"]["history_mlp"]["20+"] = {"mean": 0.02, "low": -0.001, "high": 0.041}
    claim = of(results, "history MLP", "per-user")
    assert claim.holds is False
    assert claim.verdict == "**does not hold**: the interval includes zero"
    assert claim.reached == "+2.00 [-0.10, +4.10]"


def test_a_gain_above_zero_but_short_of_its_goal_does_not_hold(results):
    results["delta_auc"]["stored"]["history_mlp"]["20+"] = {"mean": 0.0049, "low": 0.001, "high": 0.009}
    claim = of(results, "history MLP", "pooled")
    assert claim.holds is False
    assert claim.reason == "above zero, short of the goal"


def test_a_gain_that_is_not_there_is_not_measured(results):
    del results["delta_auc"]["stored"]["user_id"]
    assert of(results, "user ids").verdict == "not measured"
    results["delta_auc"]["stored"]["user_id"] = {"20": {"mean": None, "low": None, "high": None}}
    assert of(results, "user ids").holds is None


def test_the_stored_embedding_may_cost_a_fifth_of_a_point(results):
    full = results["delta_auc"]["full"]["row_mlp"]
    full["20+"] = {"mean": 0.0015, "low": -0.001, "high": 0.004}
    claim = of(results, "stored less full", "pooled")
    assert claim.holds is True
    assert claim.reached == "-0.15 [-0.40, +0.10]"
    assert "-0.40" in claim.reason
    full["20+"] = interval(0.0021, 0.001)
    assert of(results, "stored less full", "pooled").holds is False


def test_one_bad_origin_breaks_the_claim_on_few_rows(results):
    results["few_rows"]["1"]["auc"] = [interval(0.0, 0.002), interval(-0.002, 0.004)]
    claim = of(results, "k <= 5", "pooled")
    assert claim.holds is False
    assert claim.reached == "lowest -0.60"
    assert "| k = 1 | +0.00 [-0.20, +0.20] | -0.20 [-0.60, +0.20] | **no** |" in report.render(results)


def test_the_least_share_decides_and_fewer_rows_than_five_do_not_count(results):
    results["recovered_share"] |= {"1": 0.1, "10": 0.79}
    claim = of(results, "planted taste")
    assert claim.holds is False
    assert claim.reached == "least 79.0 % (k = 10)"


@pytest.mark.parametrize(
    ("part", "heading", "plot"),
    [
        (methods_part, "## Table 1", "methods.png"),
        (methods_part, "## Table 4", "refresh.png"),
        (sensitivity_part, "## Table 3", "sensitivity.png"),
        (recovery_part, "## Table 6", "recovery.png"),
        (cost_part, "## Table 7", "cost.png"),
        (drift_part, "Synthetic users whose taste and level drift", "drift.png"),
    ],
)
def test_an_absent_table_leaves_its_section_out(results, part, heading, plot):
    whole = report.render(results)
    assert heading in whole
    assert f"({plot})" in whole
    for key in part():
        del results[key]
    without = report.render(results)
    assert heading not in without
    assert f"({plot})" not in without


def test_one_table_alone_makes_a_report(results):
    about = {key: results[key] for key in ("quick", "minutes", "tables", "designs", "configurations")}
    for part in PARTS:
        page = report.render(about | part())
        assert page.startswith("# What LiMAML gains")
        assert ".png)" in page


def test_the_page_follows_from_the_results_file_and_its_plots_are_small(results, tmp_path):
    results["auc"]["stored"]["20"] = 0.7234449999
    results["log_loss"]["prior"]["20"] = float("nan")
    write(results, tmp_path)
    report.write(results, tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert page == report.render(read(tmp_path)) == report.render(plain(results))
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["cost.png", "drift.png", "methods.png", "recovery.png", "refresh.png", "sensitivity.png"]
    for name in plots:
        assert f"({name})" in page
        assert (tmp_path / name).stat().st_size < 150_000
    assert "None" not in page
    assert "nan" not in page


def test_every_row_of_a_table_has_as_many_cells_as_its_header(results):
    grocer, served = (pages.results(f"experiments/results/{name}.json") for name in ("grocery", "served"))
    readme = figures.result(results, grocer, served["grocery"])
    for page in (report.render(results), *map("\n".join, (figures.gains(results), readme, figures.served(served["grocery"])))):
        for block in page.split("\n\n"):
            rows = [line.count("|") for line in block.splitlines() if line.startswith("|")]
            assert len(set(rows)) <= 1, block


def test_a_quick_run_says_that_its_figures_mean_nothing(results):
    assert "mean nothing" not in report.render(results)
    assert "mean nothing" in report.render(results | {"quick": True})


def test_differences_are_points_and_bold_where_they_exclude_zero():
    assert text.change({"mean": 0.014, "low": 0.005, "high": 0.023}) == "**+1.4 [+0.5, +2.3]**"
    assert text.change({"mean": -0.014, "low": -0.03, "high": -0.005}) == "**-1.4 [-3.0, -0.5]**"
    assert text.change({"mean": 0.001, "low": -0.0004, "high": 0.002}) == "+0.1 [-0.0, +0.2]"
    assert text.change(None) == text.change({"mean": None, "low": None, "high": None}) == "-"


def test_what_ships_is_said_and_what_validated_higher_too(results):
    assert "`meta.inner_steps=3`; on the validation users the best of 24 (validation number 71.90)" in gains.shipped(results)
    assert "does not ship" not in gains.shipped(results)
    results["designs"]["history"]["validation"] = 0.73
    assert "*LiMAML, stored, with history features* validated higher (73.00)" in gains.shipped(results)


def test_the_page_of_results_says_what_holds_and_what_does_not(results):
    results["delta_auc"]["stored"]["history_mlp"]["20+"] = {"mean": 0.002, "low": -0.001, "high": 0.005}
    del results["delta_auc"]["stored"]["user_id"]
    page = figures.gains(json.loads(json.dumps(plain(results))))
    assert "| MLP with history features | 72.6 / 69.6 | +0.2 [-0.1, +0.5] | **+2.5 [+2.1, +2.9]** |" in page
    assert [line.split(" | ")[0] for line in page if "does not hold" in line] == ["| over the history MLP, pooled, k >= 20"]
    assert [line.split(" | ")[0] for line in page if "not measured" in line] == ["| over wide & deep user ids, pooled, k = 20"]
    assert "300 new users" in page[0]
    assert "Shipped in `configs/movielens.toml`" in page[-1]


def test_sensitivity_shows_both_metrics_and_recovery_both_shares(results):
    text = report.render(results)
    assert "71.0 / 70.0, 4.0 s" in text
    assert "The same of per-user AUC:" in text
    shown = text.split("The same of per-user AUC:")[1].split("![")[0]
    assert "a level" not in shown, "a level ranks no item above another"
    assert "85.0 % (65.0 of 66.0)" in shown
