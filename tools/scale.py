"""Figures of docs/scale.md: what `make bench-scale` measured, and what follows from it for more entities.

A figure grows as a + b * entities, through the two largest sizes that were measured: what a process costs before its first
entity does not grow with them.
"""

from collections.abc import Callable

from experiments.markdown import Results, table

TARGETS = (1_000_000, 10_000_000, 100_000_000)
_MEASURED = "measured"
_VERBS = {
    "recent": "base of the newest rows, from scratch",
    "plan": "plan-fill",
    "fill": "fill, all shards",
    "cut_over": "cut-over",
    "adapt_day": "a day: adapt",
    "publish_day": "a day: publish",
}
_PARTS = {
    ("plan", "list_entities"): "plan-fill: which entities are active",
    ("plan", "publish_features"): "plan-fill: features of all users and items, published and read back",
    ("fill", "adapt_and_gate"): "fill: rows read, sorted, encoded and adapted, the partition written; the gate",
    ("fill", "gate"): "fill: the gate alone",
    ("fill", "lease"): "fill: waiting for the shard that publishes",
    ("fill", "publish_embeddings"): "fill: publishing",
    ("fill", "read_back"): "fill: reading a sample back",
    ("cut_over", "read_back"): "cut-over: reading every embedding back",
}
_HOUR_S = 3600.0


def measured(found: Results) -> list[str]:
    """Every verb's seconds by entities, peaks, and the figures that have a goal."""
    machine, settings, sizes = found["machine"], found["settings"], _sizes(found)
    rows = [(name, *(f"{found['verbs'][str(n)][verb]['seconds']:,.1f}" for n in sizes)) for verb, name in _VERBS.items()]
    rows.append(("**from partitions to embeddings in Redis**", *(f"**{found['seconds'][str(n)]:,.1f}**" for n in sizes)))
    rows.append(("peak of our processes, MiB", *(f"{found['peak_mib'][str(n)]:,.0f}" for n in sizes)))
    rows.append(("peak of Redis, MiB", *(f"{found['redis_mib'][str(n)]:,.0f}" for n in sizes)))
    rows.append(("load of the machine (1 minute, at the end)", *(f"{found['load'][str(n)]['one_minute']:.1f}" for n in sizes)))
    return [
        f"Measured by `make bench-scale` on {machine['cores']} cores of {machine['cpu']}: {settings['rows_a_entity']} rows an"
        f" entity in the mean over {settings['days']} days, {settings['shards']} shards, {settings['processes']} processes.",
        "",
        *table(("seconds, with so many entities", *(f"{size:,}" for size in sizes)), rows),
        f"Seconds grow as entities^{found['exponent']:.2f}. A day in which {settings['changed_share']:.0%} of the entities have"
        f" new rows costs {found['daily_share']:.1%} of the processor time of plan-fill, fill and cut-over"
        f" ({found['daily_share_of_seconds']:.1%} of their seconds).",
    ]


def ray(found: Results) -> list[str]:
    """Training by one worker and by two."""
    ray, share = found["ray"], found["ray"]["repeated_share"]
    rows = [
        (tasks, f"{speeds['1']:,.0f}", f"{speeds['2']:,.0f}", f"{ray['efficiency'][tasks]:.2f}", f"{share[tasks]:.2f}")
        for tasks, speeds in sorted(ray["tasks_per_s"].items(), key=lambda pair: int(pair[0]))
    ]
    return table(
        ("tasks a step", "1 worker, tasks/s", "2 workers", "efficiency", "of a step of 1 worker, repeated by each"), rows
    )


def parts(found: Results) -> list[str]:
    """Where the time of the most entities went."""
    size = _sizes(found)[-1]
    inside = found["parts"][str(size)]
    rows = [
        (name, f"{inside[verb][part]:,.1f}", f"{1e6 * inside[verb][part] / size:,.1f}")
        for (verb, part), name in _PARTS.items()
        if part in inside[verb]
    ]
    return table((f"{size:,} entities: part", "seconds, of both processes together", "us an entity"), rows)


def carried(found: Results) -> list[str]:
    """What more entities need, if each costs what one cost here."""

    def verb(name: str, figure: str) -> Callable[[int], float]:
        return _line(found, lambda size: found["verbs"][size][name][figure])

    def part(name: str, of: str) -> Callable[[int], float]:
        return _line(found, lambda size: found["parts"][size][name].get(of, 0.0))

    adapted, published, back = part("fill", "adapt_and_gate"), part("fill", "publish_embeddings"), part("cut_over", "read_back")
    fill_cpu, day_cpu = verb("fill", "cpu_s"), [verb(name, "cpu_s") for name in ("adapt_day", "publish_day")]
    redis, plan = _line(found, lambda size: found["redis_mib"][size]), verb("plan", "peak_mib")
    rows = {
        "fill, hours of one processor": lambda n: f"{fill_cpu(n) / _HOUR_S:,.2f}",
        "shard processes like ours that adapt it within an hour": lambda n: f"{max(1.0, adapted(n) / _HOUR_S):,.0f}",
        "publishing, one shard at a time, minutes": lambda n: f"{published(n) / 60:,.1f}",
        "cut-over, reading all back, minutes": lambda n: f"{back(n) / 60:,.1f}",
        "a day with 2 % of the entities, minutes of one processor": lambda n: f"{sum(one(n) for one in day_cpu) / 60:,.1f}",
        "Redis, GiB": lambda n: f"{redis(n) / 1024:,.1f}",
        "plan-fill's memory, GiB": lambda n: f"{plan(n) / 1024:,.1f}",
    }
    header = ("entities", *(f"{n:,} ({_MEASURED})" if n in _sizes(found) else f"{n:,}" for n in TARGETS))
    return table(header, [(name, *map(of, TARGETS)) for name, of in rows.items()])


def _line(found: Results, of: Callable[[str], float]) -> Callable[[int], float]:
    """a + b * entities through the two largest sizes."""
    small, large = _sizes(found)[-2:]
    slope = (of(str(large)) - of(str(small))) / (large - small)
    return lambda entities: of(str(large)) + slope * (entities - large)


def _sizes(found: Results) -> list[int]:
    return sorted(int(size) for size in found["seconds"])
