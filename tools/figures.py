"""Figures of the pages, from the results that `make bench`, `make bench-serving` and `make experiments` left."""

from experiments.evidence import report
from experiments.evidence.answers import SIDES
from experiments.evidence.groups import FIRST_20, RETURNING
from experiments.evidence.jobs import PAST
from experiments.evidence.measure import PER_VISIT
from experiments.evidence.titles import name_of
from experiments.markdown import DASH, Results, number, over, pick, table

_GLOBAL = "global_mlp"
_WHO = {RETURNING: "returning", FIRST_20: "new, after 20 rows"}
_ROWS = {
    "task_vector": "task vector",
    "paper": "paper's form",
    "sequence": "sequence block",
}
_ENGINES = {
    "limaml": "**ours**",
    "learn2learn": "learn2learn",
    "torch_func": "torch.func vmap(grad)",
    "jax": "JAX jit(vmap(grad))",
}
_SERVICES = {
    "noop": "BentoML, no-op",
    "ours_redis": "**ours, Redis**",
    "ours_sqlite": "**ours, SQLite**",
    "plain": "FastAPI + redis-py + torch, same work",
}


def result(worlds: Results) -> list[str]:
    """The README's one table: ours beside the same network for everybody, to those who return and to new ones."""
    rows = []
    for found in worlds.values():
        sides = [side for side in SIDES if f"chosen{side}" in found][::-1]
        for side in sides:
            features = ", no history features" if side else ", history features" if len(sides) > 1 else ""
            # History features of a new user say more than 20 rows.
            for group in _WHO if side == sides[0] else (RETURNING,):
                rows.append((f"{found['title']}{features}: {_WHO[group]}", *_beside(found, side, group)))
    header = ("AUC per visit", "global MLP", "LiMAML", "gain", "over an MLP on the user's rows", "over its own prior", "chosen")
    return table(header, rows)


def _beside(found: Results, side: str, group: str) -> tuple[str, ...]:
    ours, rivals = found[f"chosen{side}"], [f"{name}{SIDES[side]}" for name in (_GLOBAL, "history_mlp")]
    values = [number(pick(found, "methods", name, group, PER_VISIT), 2) for name in (rivals[0], ours)]
    gains = [over(pick(found, f"gains{side}", group, PER_VISIT, rival), 2) for rival in rivals]
    own = ("halves", ours, PAST) if group == RETURNING else ("first_visits", ours, "20", "over_prior_of_all")
    return *values, *gains, over(pick(found, *own, PER_VISIT), 2), name_of(ours)


def world(found: Results) -> list[str]:
    """Of a world as a daily refresh serves it: every method on returning users' rows, and who gains."""
    return [report.about(found), "", *report.methods(found, RETURNING), *report.who(found), *report.lists(found)]


def engine(found: Results) -> list[str]:
    """Outer steps beside peers, adapting, publishing."""
    machine = found["machine"]
    adapted = ", ".join(
        f"{_ROWS[row]} ({steps} {'step' if steps == '1' else 'steps'}) {rate:,.0f}"
        for row, rates in sorted(found["adapt_entities_per_s"].items(), reverse=True)
        for steps, rate in rates.items()
    )
    stores = " and ".join(f"{rate:,.0f} ({store})" for store, rate in sorted(found["publish_rows_per_s"].items()))
    rows = [(name, *(_speed(found, row, key) for row in _ROWS)) for key, name in _ENGINES.items()]
    return [
        f"Measured by `make bench` on one core of {machine['cpu']} ({machine['vector_extension']}), ours and each peer in turns"
        " in one process, 256 tasks of 16 + 16 rows a step, equal gradients checked first:",
        "",
        *table(("outer steps of tasks/s, 1 / 3 inner steps", *_ROWS.values()), rows),
        f"Adapting from Parquet to Parquet, entities/s on {machine['cores']} cores: {adapted};"
        f" {found['adapt_entities']:,.0f} of them in {found['adapt_peak_mib']:,.0f} MiB."
        f" Publishing a million embeddings of 64 floats: {stores} rows/s."
        f" Tasks of 1 to 200 rows (Zipf): {found['long_tail_ratio']:.2f} of the rows/s of equal ones.",
    ]


def _speed(found: Results, row: str, engine: str) -> str:
    speeds = pick(found, "tasks_per_s", row, engine, "256") or {}
    ratios = pick(found, "ratio_to", row, engine, "256") or {}
    shown = " / ".join(f"{speeds[steps]:,.0f}" if steps in speeds else DASH for steps in ("1", "3"))
    times = " / ".join(f"{ratios[steps]:.{0 if ratios[steps] >= 10 else 2}f}x" for steps in ("1", "3") if steps in ratios)
    return f"{shown} (ours: {times})" if times else shown


def data(found: Results) -> list[str]:
    """A history beside one query, and one more day after histories of several lengths."""
    history, machine, days = found["history"], found["machine"], list(found["day_seconds"])
    seconds = {"one more day, gate to logged rows": found["day_seconds"], "adapting its users": found["adapt_seconds"]}
    return [
        f"Measured by `make bench-data` on {machine['cores']} cores of {machine['cpu']}.",
        "",
        f"{history['events']:,} events over {history['days']} days: {history['seconds']:.1f} s in {history['peak_mib']:,.0f}"
        f" MiB, {history['ratio_to_query']:.1f} times one duckdb query of the same columns over the same files "
        f"({history['query_seconds']:.2f} s).",
        "",
        *table(
            ("seconds, after so many days of history", *days),
            [(name, *(f"{one[day]:.2f}" for day in days)) for name, one in seconds.items()],
        ),
    ]


def service(found: Results) -> list[str]:
    """A request beside BentoML's floor and a plain service, and the soak."""
    machine, soaks = found["machine"], {"Redis": found["soak"]["ours_redis"], "SQLite": found["soak"]["ours_sqlite"]}
    grown = ", ".join(f"{soak['growth_mb']:.1f} MiB ({name})" for name, soak in soaks.items())
    rows = [(name, *(_pair(found, metric, key) for metric in ("p50", "p99", "rps"))) for key, name in _SERVICES.items()]
    return [
        f"A request of {found['settings']['candidates']} candidates, measured by `make bench-serving` on {machine['cores']}"
        f" cores of {machine['cpu']}, one worker each, services in turns (in parentheses: to the no-op's):",
        "",
        *table(("1 / 8 requests at once", "p50, ms", "p99, ms", "requests/s"), rows),
        f"{soaks['Redis']['requests']:,} requests at each: {sum(soak['errors'] for soak in soaks.values())} errors, memory grew"
        f" by {grown}.",
    ]


def _pair(found: Results, metric: str, name: str) -> str:
    values = found["rps" if metric == "rps" else f"{metric}_ms"][name]
    ratios = found["ratio_to_noop_by_service"][metric].get(name, {})
    shown = " / ".join(f"{values[at]:,.{0 if metric == 'rps' else 2}f}" for at in ("1", "8"))
    return shown + (f" ({' / '.join(f'{ratios[at]:.2f}x' for at in ('1', '8'))})" if ratios else "")


def encoders(found: Results) -> list[str]:
    """What text says of items that nothing else was learned of, by encoder, and what serving it costs."""

    def row(name: str, one: Results) -> tuple[str, ...]:
        shown = []
        for metric, form in (("r2", "{:.3f}"), ("pooled_auc", "{:.2f}"), ("per_user_auc", "{:.2f}")):
            if metric not in one["value"]:
                shown.append(DASH)
                continue
            text, over = form.format(one["value"][metric]), one["over_minilm"].get(metric)
            signed = form.replace(":", ":+")
            spread = ", ".join(signed.format(over[end]) for end in ("low", "high")) if over else ""
            shown.append(f"{text} ({signed.format(over['value'])} [{spread}])" if over else text)
        speed = f"{one['items_per_s']:,.0f}" if "items_per_s" in one else DASH
        return name, *shown, f"{one['bytes_an_item']:,}", f"{one['encoder_bytes'] / 1e6:.1f}", speed

    lines = list[str]()
    for world, one in found["worlds"].items():
        about = f"{world}: {one['judged_items']} judged items, {one['judged_rows']:,} rows"
        columns = (about, "R² of vectors", "pooled AUC", "per-user AUC", "bytes an item", "encoder, MB", "items/s")
        lines += table(columns, [row(name, each) for name, each in one["encoders"].items()])
    return lines


def arms(found: Results) -> list[str]:
    """How often a comparison of arms is wrong, and what it finds."""
    wrong, splits = found["false_positives"], found["splits"]
    tests = {
        **{f"`compare-arms`, after every day: {_split(splits[name])}": wrong[name] for name in sorted(splits, key=len)},
        "t-test of users' means, once at the end": wrong["t_test_of_users_once"],
        "t-test of users' means, after every day": wrong["t_test_of_users_daily"],
        "t-test of requests, once at the end": wrong["t_test_of_requests_once"],
        "t-test of requests, after every day": wrong["t_test_of_requests_daily"],
    }
    percent = "{:.1%}".format
    power = [
        (f"{int(users):,}", f"{100 * float(effect):.0f}", *_power(one))
        for users, effects in sorted(found["power"].items(), key=lambda item: int(item[0]))
        for effect, one in sorted(effects.items(), key=lambda item: float(item[0]))
    ]
    rows = [(name, f"{percent(one['share'])} [{percent(one['low'])}, {percent(one['high'])}]") for name, one in tests.items()]
    runs = wrong["two"]["of"]
    about = f"{runs:,} A/A tests of {found['users']:,} users over {found['days']} days, level {found['level']:g}"
    power_runs = next(iter(next(iter(found["power"].values())).values()))["sequential"]["of"]
    return [
        *table((f"{about}: called different", "share of tests [95 %]"), rows),
        *table(
            (
                f"users, in halves, {power_runs} tests each",
                f"points added to {100 * found['rate']:.1f}",
                "found",
                "by day",
                "t-test once at the end",
            ),
            power,
        ),
    ]


_WORLDS = {"movielens": "MovieLens", "drifting": "generated, drifting tastes"}
_STARTS = {
    "scratch": "scratch",
    "scratch_quarter": "scratch, a quarter of the steps",
    "champion": "champion",
    "champion_quarter": "champion, a quarter",
    "champion_quarter_kept": "the same, item vectors kept",
    "champion_quarter_15_rounds": "the same, 15 rounds of item vectors",
    "champion_quarter_pull_1": "a quarter, L2 of 1",
    "champion_quarter_pull_10": "a quarter, L2 of 10",
    "champion_quarter_ewc_1": "a quarter, EWC of 1",
    "champion_quarter_ewc_10": "a quarter, EWC of 10",
}


def continual(found: Results) -> list[str]:
    """Starts from the champion against starts from scratch, a table a world."""
    lines = []
    for name in sorted(found, key=list(_WORLDS).index):
        world = found[name]
        rows = [(title, *_started(world, key)) for key, title in _STARTS.items() if key in world["arms"]]
        what = ("seconds", "new days", "old days", "embeddings", "item vectors")
        lines += [*table((f"{_WORLDS[name]}, {world['steps']} steps from scratch", *what), rows), ""]
    return lines


def _started(world: Results, key: str) -> list[str]:
    """Seconds, AUC pooled / per-user of scratch or what is over it, mean cosine and the one after the best rotation."""
    arm = world["arms"][key]
    cells = [f"{arm['seconds']:.1f}"]
    for days in ("new", "old"):
        parts = [arm["judged_on"][days][metric] for metric in ("pooled", "per_user")]
        cells.append(" / ".join(f"{one['auc']:.2f}" if key == "scratch" else over(one["over_scratch"], 2) for one in parts))
    drifts = [arm["drift"][what] for what in ("embeddings", "items")]
    return cells + [f"{one['cosine']:.3f} / {one['rotated_cosine']:.3f}" for one in drifts]


def _split(shares: list[float]) -> str:
    return " / ".join(f"{100 * share:.0f} %" for share in shares)


def _power(one: Results) -> tuple[str, str, str]:
    day = DASH if one["median_day"] is None else f"{one['median_day']:.0f}"
    return f"{one['sequential']['share']:.0%}", day, f"{one['t_test_of_users_once']['share']:.0%}"


_ITEMS = {"unseen": "none", "few": "1 to 5", "rare": "6 to 50", "warm": "more", "all": "any"}
_METRICS = {"pooled_auc": "AUC, pooled", "per_user_auc": "AUC, per user", "ndcg10": "NDCG@10 of the day's catalogue"}


def transfer(found: Results) -> list[str]:
    """World by world, what vectors of text and training rows without their item's history add."""
    lines = []
    for world, one in sorted(found["worlds"].items(), reverse=True):
        with_text, hidden = one["chosen"]["with_text"], one["chosen"]["hidden"]
        titles = {
            f"{with_text}, over the same without text (chosen on the validation items)": found["gains"][world],
            f"{hidden}, over none (its share chosen on the validation items)": one["gains"]["hiding"],
        }
        if with_text != "text":
            titles["text, over none"] = one["gains"]["text"]
        for title, gains in titles.items():
            rows = [
                [label, f"{one['rows'][group]:,}", f"{one['lists'][group]:,}", *(over(gains[group][key]) for key in _METRICS)]
                for group, label in _ITEMS.items()
            ]
            lines += [f"**{world}, {one['draws']} draws: {title}**", ""]
            lines += table(("rows of the item before the day", "judged rows", "catalogues", *_METRICS.values()), rows)
        lines += _by_week(one) + _by_user(one) + _arms_of(one)
    return lines


def _by_week(one: Results) -> list[str]:
    rows = [
        [
            week["from"],
            f"{week['rows']:,}",
            f"{week['unseen_rows']:,}",
            f"{week['items']:,}",
            f"{week['auc']:.1f}",
            *_pooled(week),
        ]
        for week in one["weeks"]
    ]
    return table(("week from", "judged rows", "of untouched items", "items touched before it", "AUC", *_POOLED), rows)


def _by_user(one: Results) -> list[str]:
    titles = {"new": "without a row before the day", "returning": "with rows before it"}
    rows = [[title, f"{one['users'][key]['rows']:,}", *_pooled(one["users"][key])] for key, title in titles.items()]
    return table(("users", "judged rows", *_POOLED), rows)


_POOLED = ("hiding: all", "hiding: untouched items", "vectors: all", "vectors: untouched items")


def _pooled(part: Results) -> list[str]:
    found = [part[rows][arm].get("pooled_auc") for arm in ("hiding", "vectors") for rows in ("all", "unseen")]
    return [over(one) if one else DASH for one in found]


def _arms_of(one: Results) -> list[str]:
    """Calibration by group, and what the ten best are."""
    groups = ("unseen", "warm", "all")
    rows = []
    arms = {name: one["arms"][name] for name in sorted(one["arms"], key=lambda name: (len(name), name))}
    for name, arm in arms.items():
        parts = [arm["groups"][group] for group in groups]
        means = (f"{part['mean_score']:.3f} / {part['label_rate']:.3f}" for part in parts)
        losses = (f"{part['log_loss']:.4f} / {part['calibration_error']:.3f}" for part in parts)
        rows.append([name, *(cell for pair in zip(means, losses, strict=True) for cell in pair)])
    what = (f"{_ITEMS[group]}: {of}" for group in groups for of in ("score / label", "log loss / ECE"))
    lines = table(("calibration, rows of the item before the day", *what), rows)
    of_lists = ("diversity", "novelty", "coverage", "exposure_gini", "unseen_share")
    rows = [[name, *(f"{arm[key]:.3f}" for key in of_lists)] for name, arm in arms.items()]
    return lines + table(("the ten best of the day's catalogue", *(key.replace("_", " ") for key in of_lists)), rows)
