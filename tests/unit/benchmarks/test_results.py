"""Parts made by hand, joined, written, and shown."""

import json

import pytest
from rich.console import Console

from benchmarks import results, table


def part(peer, ours, theirs):
    return {
        "tasks_per_s": {"task_vector": {"limaml": {"32": {"1": ours}}, peer: {"32": {"1": theirs}}}},
        "ratio_to": {"task_vector": {peer: {"32": {"1": ours / theirs}}}},
        "gemm_peak_gflops": {"mkl": ours / 10, "onednn": ours / 5},
        "max_gradient_error": {peer: 1e-6},
        "versions": {peer: "1.0"},
        "busy": [f"{peer}.task_vector.32.1"] if ours < 900.0 else [],
    }


@pytest.fixture
def joined():
    return results.merge(
        [
            {"device": "cpu"},
            part("learn2learn", 800.0, 100.0),
            part("jax", 1000.0, 2000.0),
            {"not_run": {"torch_func": "no wheel"}},
        ]
    )


def test_parts_join_to_one_tree(joined):
    assert joined["tasks_per_s"]["task_vector"] == {
        "limaml": {"32": {"1": 1000.0}},
        "learn2learn": {"32": {"1": 100.0}},
        "jax": {"32": {"1": 2000.0}},
    }
    # A ratio is of one run: 800 / 100, though another run of ours reached 1000.
    assert joined["ratio_to"]["task_vector"] == {"learn2learn": {"32": {"1": 8.0}}, "jax": {"32": {"1": 0.5}}}
    assert joined["gemm_peak_gflops"] == {"mkl": 100.0, "onednn": 200.0}
    assert joined["busy"] == ["learn2learn.task_vector.32.1"]
    assert joined["not_run"] == {"torch_func": "no wheel"}


def test_joining_leaves_the_parts_as_they_were():
    first = part("learn2learn", 800.0, 100.0)
    results.merge([first, part("learn2learn", 900.0, 100.0)])
    assert first == part("learn2learn", 800.0, 100.0)


def test_parts_of_different_environments_do_not_join():
    with pytest.raises(ValueError, match=r"versions\.torch must be the same in every part, got '2\.13' and '2\.14'"):
        results.merge([{"versions": {"torch": "2.13"}}, {"versions": {"torch": "2.14"}}])


def test_results_are_written_whole(joined, tmp_path):
    path = tmp_path / "results" / "engine.json"
    results.write(joined, path)
    results.write(joined, path)
    assert json.loads(path.read_text()) == joined
    assert [found.name for found in path.parent.iterdir()] == ["engine.json"]


def test_the_machine_is_named_by_its_class():
    found = results.machine()
    assert set(found) == {"cpu", "vector_extension", "cores", "memory_gib", "system"}
    assert found["cores"] >= 1


def test_the_table_says_who_could_not_run_and_when_the_machine_was_busy(joined):
    console = Console(record=True, width=200)
    table.print_tables(joined, console)
    text = console.export_text()
    for wanted in (
        "task vector: tasks/s",
        "100 (8.0x)",
        "2,000 (0.5x)",
        "torch_func could not run here: no wheel",
        "onednn: 200 GFLOP/s",
        "learn2learn.task_vector.32.1",
    ):
        assert wanted in text, wanted


def test_a_cell_without_time_is_a_gap(joined):
    """jax has no figure for 256 tasks, and the table says so."""
    joined["tasks_per_s"]["task_vector"]["limaml"]["256"] = {"1": 5000.0}
    joined["skipped"] = ["jax.task_vector.256.1"]
    console = Console(record=True, width=200)
    table.print_tables(joined, console)
    assert "No time was left for jax.task_vector.256.1" in console.export_text()


def test_the_plot_is_an_image(joined, tmp_path):
    table.plot(joined, tmp_path / "engine.png")
    assert (tmp_path / "engine.png").read_bytes().startswith(b"\x89PNG")
    assert [found.name for found in tmp_path.iterdir()] == ["engine.png"]
