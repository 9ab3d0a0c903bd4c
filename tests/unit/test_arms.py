"""The split: shares, independence of what else hashes a user, the same in every process; and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import chi2_contingency, chisquare

from limaml.arms import Arms
from limaml.config import Config, ExperimentConfig
from serving.request_log import RequestLog

USERS = [f"u{number}" for number in range(20_000)]
THREE = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.3}, {"name": "c", "share": 0.2}]
# Of one split that is looked at once; a fair one fails with this probability, and never again, as it is always the same.
CHANCE = 1e-3


def split(salt, arms=THREE):
    arms = Arms(ExperimentConfig.model_validate({"salt": salt, "arms": arms}))
    return [arms.of(user).name for user in USERS]


def counts(*splits):
    names = np.array(splits)
    return np.array([[np.sum((names[0] == one) & (names[-1] == other)) for other in "abc"] for one in "abc"])


def test_arms_get_their_shares():
    found = [split("first").count(name) for name in "abc"]
    assert chisquare(found, [10_000, 6_000, 4_000]).pvalue > CHANCE


def test_another_salt_splits_anew_and_neighbouring_ones_do_not_touch():
    for other in ("second", "firs", "first1"):
        assert chi2_contingency(counts(split("first"), split(other))).pvalue > CHANCE
    assert split("first") == split("first")


def test_the_log_takes_as_many_of_each_arm(tmp_path):
    serving = {"log_share": 0.3, "log_path": str(tmp_path)}
    log = RequestLog(Config.model_validate({"source": {"kind": "synthetic"}, "serving": serving}))
    is_logged = np.array([log.wants(user) for user in USERS])
    log.close()
    names = np.array(split("first"))
    table = [[np.sum((names == arm) & (is_logged == logged)) for logged in (True, False)] for arm in "abc"]
    assert chi2_contingency(table).pvalue > CHANCE


def test_a_user_is_in_the_same_arm_in_every_process():
    script = (
        "from limaml.arms import Arms; from limaml.config import ExperimentConfig\n"
        f"arms = Arms(ExperimentConfig.model_validate({{'salt': 'first', 'arms': {THREE}}}))\n"
        "print(*[arms.of(f'u{n}').name for n in range(200)], arms.of('é').name, arms.of('\\ud800').name)"
    )
    runs = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert runs.pop().split()[:200] == split("first")[:200]


def test_thirds_reach_the_end_of_the_range():
    names = split("thirds", [{"name": name, "share": 1 / 3} for name in "abc"])
    assert chisquare([names.count(name) for name in "abc"]).pvalue > CHANCE


def test_without_arms_nobody_is_in_one():
    assert Arms(ExperimentConfig()).of("u1") is None


TWO = [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.5}]


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        ({"salt": "s", "arms": TWO[:1]}, "arms must be two or more, each name once, got ['a']"),
        ({"salt": "s", "arms": [TWO[0], TWO[0]]}, "arms must be two or more, each name once, got ['a', 'a']"),
        ({"salt": "s", "arms": [TWO[0], {"name": "b", "share": 0.4}]}, "arms must have shares that add up to 1, got 0.9"),
        ({"arms": TWO}, 'salt must be given where there are arms, got ""'),
        ({"salt": "s", "arms": [TWO[0], TWO[1] | {"version": "7"}]}, "only these two have embeddings in a slot"),
    ],
)
def test_what_is_no_split_is_refused(experiment, said):
    with pytest.raises(ValidationError) as refused:
        ExperimentConfig.model_validate(experiment)
    assert said in str(refused.value)


def test_arms_that_are_not_logged_are_refused():
    values = {"source": {"kind": "synthetic"}, "experiment": {"salt": "s", "arms": TWO}}
    with pytest.raises(ValidationError, match=r"serving.log_share must be > 0 where experiment.arms are declared, got 0"):
        Config.model_validate(values)
    Config.model_validate(values | {"serving": {"log_share": 0.1}})
