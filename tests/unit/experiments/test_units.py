"""Units: kept, taken up again, and computed anew where they would differ."""

import numpy as np
import pytest

from experiments.units import Output, Store, Unit, run_units


def double(unit: Unit) -> Output:
    if unit.params["number"] < 0:
        raise ValueError("numbers must be positive")
    return Output({"doubled": 2 * unit.params["number"]}, {"both": np.full(2, unit.params["number"])})


def numbers(*values):
    return [Unit("double", f"n{value}", {"number": value}) for value in values]


def run(units, store):
    return {unit.key: (output, is_new) for unit, output, is_new in run_units(units, {"double": double}, store, 1)}


def test_what_is_finished_is_not_computed_again(tmp_path):
    store = Store(tmp_path, "mark")
    first = run(numbers(3), store)
    again = run(numbers(3, 4), store)
    assert first["n3"][1]
    assert not again["n3"][1]
    assert again["n4"][1]
    assert again["n3"][0].values["doubled"] == 6
    assert np.array_equal(again["n3"][0].arrays["both"], [3, 3])
    assert again["n3"][0].values["seconds"] == first["n3"][0].values["seconds"] > 0


def test_other_code_or_parameters_are_another_unit(tmp_path):
    (unit,) = numbers(3)
    Store(tmp_path, "mark").write(unit, Output({"doubled": 6}))
    assert Store(tmp_path, "mark").read(unit) is not None
    assert Store(tmp_path, "other").read(unit) is None
    assert Store(tmp_path, "mark").read(Unit("double", "n3", {"number": 4})) is None


def test_a_failure_names_its_unit_and_leaves_the_finished_ones(tmp_path):
    store = Store(tmp_path, "mark")
    with pytest.raises(ValueError, match="must be positive") as caught:
        run(numbers(3, -1), store)
    assert caught.value.__notes__ == ["unit double/n-1 with {'number': -1}"]
    assert store.read(numbers(3)[0]) is not None
    assert store.read(numbers(-1)[0]) is None
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
