"""Choose every method's design on the validation users of all origins, and freeze it in designs.json.

    .venv/bin/python -m experiments.search [--methods history_mlp,stored] [--configurations 20]

Each method gets the same number of configurations, drawn from its own space by one generator; the one whose validation number
(`MethodValidator.auc`: the mean over protocols of pooled and per-user AUC), averaged over the origins, is best wins. No test
row is read. Methods without settings have one configuration.
"""

import json
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from experiments.cached_jobs import Job, JobCache, JobOutput
from experiments.code_digest import revision
from experiments.data import MOVIELENS, WORK
from experiments.designs import PATH
from experiments.methods.registry import METHODS
from experiments.methods.search_spaces import SPACES
from experiments.origin_data import movielens
from experiments.origins import NUM_ORIGINS
from experiments.progress import follow

TABLE = "search"


def jobs(methods: list[str], configurations: int) -> list[Job]:
    """One for every method, configuration and origin."""
    found = []
    for name in methods:
        for number, design in enumerate(drawn(name, configurations)):
            for origin in range(NUM_ORIGINS):
                params = {"method": name, "design": design, "origin": origin, "root": str(MOVIELENS)}
                found.append(Job(TABLE, f"{name}/{number}/origin{origin}", params))
    return found


def drawn(method: str, configurations: int) -> list[dict[str, Any]]:
    if method not in SPACES:
        return [{}]
    rng = np.random.default_rng(0)
    return [dict(SPACES[method](rng)) for _ in range(configurations)]


def run(job: Job) -> JobOutput:
    """Fit one design at one origin; what it is worth on that origin's validation users."""
    params = job.params
    fitted = METHODS[params["method"]](movielens(params["root"])[params["origin"]], params["design"], 0)
    return JobOutput({"validation": fitted.validation, "notes": fitted.notes})


def chosen(outputs: dict[str, JobOutput], method: str, configurations: int) -> dict[str, Any]:
    """The best design of one method, and all values that it was chosen from."""
    designs = drawn(method, configurations)
    values = [
        float(np.mean([outputs[f"{method}/{n}/origin{o}"].values["validation"] for o in range(NUM_ORIGINS)]))
        for n in range(len(designs))
    ]
    best = int(np.argmax(values))
    return {
        "design": designs[best],
        "validation": values[best],
        "configurations": len(designs),
        "validation_of_all": sorted((round(value, 5) for value in values), reverse=True),
    }


def search(
    methods: Annotated[str, typer.Option(help="Names, with commas; all if empty.")] = "",
    configurations: Annotated[int, typer.Option(help="For each method that has settings.")] = 20,
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Write designs.json anew, or the named methods' part of it."""
    names = [name for name in methods.split(",") if name] or list(METHODS)
    movielens(str(MOVIELENS))
    cache = JobCache(WORK / "units", revision("origin_data", "methods", "search"))
    outputs = follow(jobs(names, configurations), {TABLE: run}, cache, workers, Console())
    designs = json.loads(PATH.read_text()) if PATH.exists() else {}
    for name in names:
        designs[name] = chosen({job.key: output for job, output in outputs.items()}, name, configurations)
        Console().print(name, designs[name]["validation"], designs[name]["design"])
    PATH.write_text(json.dumps(designs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(search)
    app()
