"""Settings of a split that do not fit each other are refused when they are read."""

from pathlib import Path

import pytest

from limaml import config
from limaml.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"

SETTINGS: list[tuple[list[str], str]] = [
    (
        ["evaluation.held_out='hash'", "evaluation.validate_from=2026-01-04"],
        "validate_from and test_from must both be set or neither, got validate_from = 2026-01-04, test_from = None; "
        "set the other one, too",
    ),
    (
        ["evaluation.held_out='hash'", "evaluation.validate_from=2026-01-04", "evaluation.test_from=2026-01-04"],
        "validate_from must be before test_from, got validate_from = 2026-01-04, test_from = 2026-01-04; leave days between",
    ),
    (
        ["evaluation.validate_from=2026-01-04", "evaluation.test_from=2026-01-05"],
        'must not be set where held_out = "late", whose instants are arrivals, got validate_from = 2026-01-04',
    ),
    (
        ["evaluation.train_share_of_days=0.9"],
        "train_share_of_days + validation_share_of_days must be < 1, got 1; leave days for the test",
    ),
    (
        ["evaluation.train_share_of_users=0.95"],
        "train_share_of_users + validation_share_of_users must be < 1, got 1.05; leave users to hold out for the test",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(CONFIGS / "movielens.toml", overrides)
    assert message in str(caught.value)
