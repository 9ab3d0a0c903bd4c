"""The answers of a world, from the outputs of its jobs: JSON values, AUCs and NDCG in points.

chosen          of ours what ships, or else the simplest arm, that validates within 0.1 points of the best;
                chosen_without_history: where no arm has history features
gains           group -> metric -> rival -> what the chosen arm has over it; gains_without_history: neither has history
methods         method -> group -> metric -> value
groups          every group -> rows, users, and what the chosen arm has over the networks of `OVER`, with and without history
first_visits    method -> k -> metric -> value; of what is chosen, k > 0 less k = 0 (the prior), at each origin and of all
staleness       arm -> cadence -> group -> metric -> value, and what it has over a daily refresh; by_drift: the same of what
                ships, half-life in days -> cadence, where tastes drift faster and slower (`run` adds it)
halves          of ours on rows of the first half of the judged days: what embeddings of earlier rows, and of the other half's
                rows, have over the prior
repeats         how much of what the global MLP leaves unexplained repeats (`experiments.evidence.reliability`)
cost            job -> seeds, seconds of a seed at one origin; of ours seconds to train, microseconds a task, bytes stored
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow.compute as pc

from experiments.cached_jobs import JobOutput
from experiments.evidence import groups, measure
from experiments.evidence.arms import ARMS, NEARLY, ONCE, REFRESHED, SHIPPABLE, WITHOUT, retraining
from experiments.evidence.groups import ALL, FIRST_20, HALF, MAIN, NEW, RETURNING, WHOLE
from experiments.evidence.jobs import DAILY, FIRST, FUTURE, HALVES, KS, LISTS, NOTHING, PAST, SERVED
from experiments.evidence.measure import METRICS, Draws, Judged, Part
from experiments.evidence.reliability import repeats
from experiments.evidence.worlds import Origin
from limaml.metrics import Floats, draw_users

DRAWS = 1000
GLOBAL = "global_mlp"
SIDES = {"": "", "_without_history": WITHOUT}
"""Ends of the results' keys -> of the methods' titles."""
COSTS = ("seconds", "train_seconds", "adapt_us", "stored_bytes", "best_step")
LEAST_DAYS = 7
"""Judged days that are worth drawing from."""
OVER = {"over_global": GLOBAL, "over_ids": "wide_deep"}
"""Of each group: without personalisation, and with user ids, which is what the paper holds itself against."""
_PROTOCOLS = {FIRST_20: FIRST, WHOLE: LISTS, HALF: HALVES}
_VARIANT_OF = {FIRST_20: str(KS[-1]), HALF: PAST}

Outputs = Mapping[tuple[bool, str], Sequence[Sequence[JobOutput]]]
"""(with history, job) -> [origin][seed]."""


@dataclass(frozen=True)
class Method:
    """Where a method's scores are: the job that made them, and its name there."""

    history: bool
    job: str
    name: str

    @property
    def title(self) -> str:
        return self.name if self.history else f"{self.name}{WITHOUT}"


class Answers:
    def __init__(self, origins: Sequence[Origin], outputs: Outputs) -> None:
        self._origins, self._outputs = origins, outputs
        self._measured: dict[tuple[str, str, str, bool, bool], dict[str, tuple[float, Floats]]] = {}

    def all(self) -> dict[str, Any]:
        found = {
            "validation": self.validation,
            "methods": {title: self._values(title) for title in self.methods},
            "groups": {group: self._group(group) for group in self._parts},
            "first_visits": self._first_visits(),
            "staleness": self._staleness(),
            "halves": self._halves(),
            "repeats": self._repeats(),
            "cost": self._cost(),
        }
        for side, ours in self.chosen.items():
            found[f"chosen{side}"], found[f"gains{side}"] = ours, {group: self._gains(group, ours) for group in MAIN}
        return found

    @cached_property
    def methods(self) -> dict[str, Method]:
        """By title. Rules that read no network come once."""
        found = {}
        for (history, job), outputs in self._outputs.items():
            for key in outputs[0][0].arrays:
                protocol, _, rest = key.partition("|")
                if protocol == SERVED and rest.startswith(f"{DAILY}|"):
                    method = Method(history, job, rest.partition("|")[2])
                    found[method.title] = method
        return found

    @cached_property
    def validation(self) -> dict[str, float]:
        """Of ours, the mean of what training stopped on, over origins and seeds."""
        return {
            f"{arm}{'' if history else WITHOUT}": float(np.mean([one.values["validation"] for each in outputs for one in each]))
            for (history, arm), outputs in self._outputs.items()
            if arm in ARMS
        }

    @cached_property
    def chosen(self) -> dict[str, str]:
        """Side -> title."""
        found = {}
        for side, suffix in SIDES.items():
            values = {title: self.validation[title] for arm in SHIPPABLE if (title := f"{arm}{suffix}") in self.validation}
            if values:
                found[side] = next(title for title, value in values.items() if value >= max(values.values()) - NEARLY)
        return found

    @cached_property
    def _judged(self) -> dict[str, list[Judged]]:
        """Protocol -> an origin's rows; every method has scored the same ones."""
        users = pc.unique(self._origins[0].logged["user_id"])
        found = {}
        ways = {SERVED: groups.served} | {protocol: partial(groups.alone, group) for group, protocol in _PROTOCOLS.items()}
        for protocol, of in ways.items():
            with_it = [each for each in self._outputs.values() if all(protocol in seeds[0].arrays for seeds in each)]
            if not with_it:
                continue
            places = [each[0].arrays[protocol] for each in with_it[0]]
            for outputs in with_it:
                for place_R, seeds in zip(places, outputs, strict=True):
                    assert all(np.array_equal(seed.arrays[protocol], place_R) for seed in seeds), "judged on other rows"
            found[protocol] = [of(origin, place_R, users) for origin, place_R in zip(self._origins, places, strict=True)]
        return found

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        """Group -> an origin's rows of it; groups that an origin has no row of are left out."""
        found = {}
        for parts in self._judged.values():
            for group in parts[0].groups:
                if all(part.groups.get(group, np.zeros(1)).any() for part in parts):
                    found[group] = [part.part(group) for part in parts]
        return found

    @cached_property
    def _weights(self) -> dict[bool, Floats]:
        """Whether of days -> draws."""
        found = {}
        for by_day in (False, True):
            number = 1 + max(
                int((part.day_R if by_day else part.user_R).max()) for parts in self._judged.values() for part in parts
            )
            found[by_day] = draw_users(number, draws=DRAWS, seed=int(by_day))
        return found

    def _scores(self, method: Method, group: str, variant: str) -> Iterator[tuple[int, Floats]]:
        """Each seed's scores of the group's rows, with the number of its origin."""
        protocol = _PROTOCOLS.get(group, SERVED)
        for number, seeds in enumerate(self._outputs[method.history, method.job]):
            mask_R = self._judged[protocol][number].groups[group]
            for seed in seeds:
                yield number, seed.arrays[f"{protocol}|{variant}|{method.name}"].astype(np.float64)[mask_R]

    def _has(self, title: str, group: str) -> bool:
        """A sequence model is judged as served alone, and so are items that are adapted, and what is retrained."""
        method, key = self.methods[title], f"{_PROTOCOLS.get(group, SERVED)}|{_VARIANT_OF.get(group, DAILY)}"
        outputs = self._outputs[method.history, method.job]
        return group in self._parts and all(f"{key}|{method.name}" in seeds[0].arrays for seeds in outputs)

    def _of(
        self,
        title: str,
        group: str,
        variant: str = "",
        *,
        by_day: bool = False,
        origin: int | None = None,
        pooled: bool | None = None,
    ) -> Draws:
        """Metrics with draws, means over origins and seeds, or over one origin's seeds; pooled ones of the main groups alone.

        What is asked for without an origin is kept.
        """
        variant = variant or _VARIANT_OF.get(group, DAILY)
        pooled = group in MAIN if pooled is None else pooled
        key = title, group, variant, by_day, pooled
        if origin is None and key in self._measured:
            return self._measured[key]
        parts: dict[str, list[tuple[float, Floats]]] = {}
        for number, score_R in self._scores(self.methods[title], group, variant):
            if origin in (None, number):
                part = self._parts[group][number]
                for metric, pair in part.measured(score_R, self._weights[by_day], by_day=by_day, pooled=pooled).items():
                    parts.setdefault(metric, []).append(pair)
        found = {metric: measure.mean(pairs) for metric, pairs in parts.items()}
        if origin is None:
            self._measured[key] = found
        return found

    def _gains(self, group: str, ours: str) -> dict[str, Any]:
        """Metric -> rival -> what `ours` has over it; rivals whose titles end alike, and those that read no feature."""
        once = {title for title, method in self.methods.items() if retraining(method.job)[0] in ONCE} - {"own_rate"}
        alike = {title for title in self.methods if title.endswith(WITHOUT) == ours.endswith(WITHOUT)}
        rivals = [title for title in self.methods if title in once | alike and title != ours]
        rivals = [title for title in rivals if self._has(ours, group) and self._has(title, group)]
        found: dict[str, Any] = {metric: {} for metric in METRICS}
        num_days = len({day for judged in self._judged[SERVED] for day in judged.day_R.tolist()})
        for rival in rivals:
            for by_day in (False, True) if num_days >= LEAST_DAYS else (False,):
                us, them = (self._of(title, group, by_day=by_day) for title in (ours, rival))
                for metric, pair in us.items():
                    one = measure.gain(pair, them[metric])
                    if by_day:
                        found[metric][rival]["by_day"] = one
                    else:
                        found[metric][rival] = one
        return found

    def _values(self, title: str) -> dict[str, Any]:
        """Group -> metric -> value, of the main groups."""
        found = {}
        for group in MAIN:
            if self._has(title, group):
                values = {metric: value for metric, (value, _) in self._of(title, group).items()}
                found[group] = values | self._mean(Part.points, title, group, _VARIANT_OF.get(group, DAILY))
        return found

    def _mean(self, of: Callable[[Part, Floats], dict[str, float]], title: str, group: str, variant: str) -> dict[str, float]:
        """Over origins and seeds, without draws."""
        scores = self._scores(self.methods[title], group, variant)
        every = [of(self._parts[group][number], score_R) for number, score_R in scores]
        return {name: float(np.mean([each[name] for each in every])) for name in every[0]}

    def _group(self, group: str) -> dict[str, Any]:
        """Who they are, and what the chosen arm has over other networks there."""
        parts = self._parts[group]
        found: dict[str, Any] = {
            "rows": sum(len(part.labels_R) for part in parts),
            "users": len(np.unique(np.concatenate([part.user_R for part in parts]))),
        }
        for (name, network), (side, ours) in product(OVER.items(), self.chosen.items()):
            rival = f"{network}{SIDES[side]}"
            if self._has(ours, group) and self._has(rival, group):
                us, them = self._of(ours, group), self._of(rival, group)
                found[f"{name}{side}"] = {metric: measure.gain(us[metric], them[metric]) for metric in us}
        return found

    def _first_visits(self) -> dict[str, Any]:
        """Of every method after k rows its values; of what is chosen also what the rows add to the prior."""
        found: dict[str, Any] = {}
        for title in self.methods:
            if not self._has(title, FIRST_20):
                continue
            found[title] = {str(k): {"values": self._mean(Part.values, title, FIRST_20, str(k))} for k in KS}
            for k, origin in product(KS[1:], (None, *range(len(self._origins)))) if title in self.chosen.values() else ():
                prior, after = (self._of(title, FIRST_20, str(rows), origin=origin) for rows in (0, k))
                one = {metric: measure.gain(after[metric], prior[metric]) for metric in METRICS}
                if origin is None:
                    found[title][str(k)]["over_prior_of_all"] = one
                else:
                    found[title][str(k)].setdefault("over_prior", []).append(one)
        return found

    def _staleness(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for title, method in self.methods.items():
            if method.name not in REFRESHED:
                continue
            arrays = self._outputs[method.history, method.job][0][0].arrays
            cadences = [key.split("|")[1] for key in arrays if key.startswith(f"{SERVED}|")]
            for group in (RETURNING, NEW, ALL):
                daily = self._of(title, group)
                for cadence in cadences:
                    values = self._mean(Part.values, title, group, cadence)
                    of = self._of(title, group, cadence, pooled=False)
                    over = {metric: measure.gain(of[metric], daily[metric]) for metric in of}
                    found.setdefault(title, {}).setdefault(cadence, {})[group] = {"values": values, "over_daily": over}
        return found

    def _halves(self) -> dict[str, Any]:
        """Of ours, what rows known before and rows of the judged days' other half add to the prior."""
        found: dict[str, Any] = {}
        for title in self.methods:
            if self._has(title, HALF):
                prior = self._of(title, HALF, NOTHING)
                for variant in (PAST, FUTURE):
                    of = self._of(title, HALF, variant)
                    found.setdefault(title, {})[variant] = {metric: measure.gain(of[metric], prior[metric]) for metric in of}
        return found

    def _repeats(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for title in (each for each in (GLOBAL, f"{GLOBAL}{WITHOUT}") if each in self.methods):
            parts: dict[str, list[tuple[float, Floats]]] = {}
            for number, score_R in self._scores(self.methods[title], RETURNING, DAILY):
                judged = self._judged[SERVED][number]
                category_R = judged.category_R[judged.groups[RETURNING]]
                of = repeats(self._parts[RETURNING][number], score_R, category_R, self._weights[False])
                for name, pair in of.items():
                    parts.setdefault(name, []).append(pair)
            found[title] = {name: measure.gain(measure.mean(pairs), (0.0, np.zeros(DRAWS))) for name, pairs in parts.items()}
        return found

    def _cost(self) -> dict[str, Any]:
        """Job -> the means of what its outputs say; of ours, where the core fits them, more than the seconds."""
        found: dict[str, Any] = {}
        for (history, job), outputs in self._outputs.items():
            of = {name: [seed.values[name] for each in outputs for seed in each if name in seed.values] for name in COSTS}
            means = {name: float(np.mean(values)) for name, values in of.items() if values}
            found[f"{job}{'' if history else WITHOUT}"] = means | {"seeds": len(outputs[0])}
        return found
