"""The card of a model version (`card.json` in its bundle): what it was made of, on what terms, and what was measured of it.

made_of      source with terms, digest and span of its days; encoders with terms; features with purpose, consent, retention
use          what the version was trained for
leakage      what the checks before training found (limaml.governance.leakage)
evaluation   as served, by group: rows, users, AUC with intervals. Written by `evaluate`, as are
limits       what the evaluation could not see, in numbers
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from limaml.config import Config
from limaml.config.governance import Terms, terms_of
from limaml.events import embedded
from limaml.events.day_store import DayManifest, EventStore
from limaml.io.storage import Storage

Card = dict[str, Any]
SHOWN = "limaml.card"
"""Tags of a model version that hold its headline begin so."""
_METHODS = ("limaml", "global_mlp")
_METRICS = ("pooled_auc", "per_user_auc")


def of_training(cfg: Config, through: date, leakage: Mapping[str, Any]) -> Card:
    """What is known once a version is trained."""
    storage = Storage(cfg.storage.root)
    manifests = EventStore(storage).manifests().values()
    days = [manifest for manifest in manifests if manifest.status == "passed" and manifest.day <= through]
    source, *encoders = terms_of(cfg)
    vectors = [feature for feature in cfg.features if feature.type == "vector"]
    made_of = [
        {
            "feature": feature.name,
            "encoder": feature.encoder,
            "width": feature.width,
            "digest": embedded.encoder_digest(storage, feature.name),
            **_said(terms),
        }
        for feature, terms in zip(vectors, encoders, strict=True)
    ]
    features = [
        feature.model_dump(mode="json", include={"name", "entity", "type", "purpose", "consent", "retention_days"})
        for feature in cfg.features
    ]
    return {
        "use": cfg.governance.intended_use,
        "made_of": {
            "data": [{"source": cfg.source.kind, **_said(source), **_span(days)}],
            "encoders": made_of,
            "features": features,
        },
        "leakage": dict(leakage),
    }


def judged(card: Mapping[str, Any], result: Mapping[str, Any]) -> Card:
    """The card with what `evaluate` measured; `result` is evaluation.json's."""
    groups = {name: _row(table) for name, table in result["as_served"].items()} | result["by_category"]
    first = {f"first {k} rows": _row(table) for k, table in result["first_k"].items()}
    evaluation = {"decision": result["decision"], "reasons": result["reasons"], "as_served": groups, "held_out_users": first}
    evaluation["agreement"] = result["agreement"]
    return {**card, "evaluation": evaluation, "limits": result["limits"]}


def headline(card: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a model version that say the most important of its card, a line each."""
    if not card:
        return {}
    [data] = card["made_of"]["data"]
    encoders = "".join(f"; {one['encoder']} ({one['licence']})" for one in card["made_of"]["encoders"])
    tags = {
        f"{SHOWN}.data": f"{data['source']}, {data['rows']:,} rows of {data['first_day']} to {data['last_day']}{encoders}",
        f"{SHOWN}.use": f"for {card['use']}; the data permits {data['permitted_use']}: {data['licence']}",
    }
    if "evaluation" in card:
        served, limits = card["evaluation"]["as_served"]["all"], card["limits"]
        auc = f"pooled AUC {_shown(served['limaml']['pooled_auc'])} as served, of {served['users']} users"
        tags[f"{SHOWN}.limits"] = f"{auc}; {limits['share_of_rows_without_support']:.0%} of their rows without support"
        if lines := list(_agreement_lines(card["evaluation"])):
            tags[f"{SHOWN}.agreement"] = "; ".join(" ".join(line.split()) for line in lines)
    return tags


def lines(card: Mapping[str, Any]) -> Iterator[str]:
    """The whole card, for people."""
    made_of = card["made_of"]
    yield f"Trained for: {card['use']}"
    yield "Data"
    for data in made_of["data"]:
        yield f"  {data['source']}: {data['rows']:,} rows on {data['days']} days, {data['first_day']} to {data['last_day']}"
        yield from _terms_lines(data)
        yield f"    digest {data['digest']}"
    yield "Encoders" if made_of["encoders"] else "Encoders: none"
    for one in made_of["encoders"]:
        yield f"  {one['feature']}: {one['encoder']}, {one['width']} wide"
        yield f"    digest {one['digest'] or 'not known: it was delivered'}"
        yield from _terms_lines(one)
    yield "Features"
    for one in made_of["features"]:
        kept = f"{one['retention_days']} days" if one["retention_days"] else "as long as the rows"
        said = [f"purpose: {one['purpose'] or 'not declared'}", f"basis: {one['consent'] or 'not declared'}", f"kept {kept}"]
        yield f"  {one['name']} ({one['type']} of {one['entity']}): {'; '.join(said)}"
    yield "Leakage checks"
    yield from (f"  {name.replace('_', ' ')}: {json.dumps(value)}" for name, value in card["leakage"].items())
    if "evaluation" in card:
        yield from _evaluation_lines(card["evaluation"], card["limits"])


def _evaluation_lines(evaluation: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[str]:
    yield f"Evaluation: {evaluation['decision']}"
    yield from (f"  {reason}" for reason in evaluation["reasons"])
    for title, groups in (("As served", evaluation["as_served"]), ("New users", evaluation["held_out_users"])):
        yield f"{title}: rows, users, pooled AUC, per-user AUC, and the global MLP's"
        for name, row in groups.items():
            aucs = [_with_interval(row["limaml"], metric) for metric in _METRICS]
            rival = "/".join(_shown(row["global_mlp"][metric]) for metric in _METRICS)
            yield f"  {name:<28} {row['rows']:>8,} {row['users']:>7,}  {'  '.join(aucs)}  {rival}"
    yield from _agreement_lines(evaluation)
    yield "Known limits"
    yield from (f"  {name.replace('_', ' ')}: {json.dumps(value)}" for name, value in limits.items())


def _agreement_lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    if against := evaluation.get("agreement"):
        yield f"Mean cosine with champion {against['champion']}, and after the best rotation"
        for what in ("embeddings", "items"):
            if found := against[what]:
                yield f"  {what} {found['cosine']:.3f}, {found['rotated_cosine']:.3f} of {found['number']:,}"


def _terms_lines(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"    licence: {part['licence']} (permits {part['permitted_use']})"
    if part["attribution"]:
        yield f"    attribution: {part['attribution']}"


def _said(terms: Terms) -> dict[str, str]:
    return {"licence": terms.licence, "permitted_use": terms.permitted_use, "attribution": terms.attribution}


def _span(days: Sequence[DayManifest]) -> dict[str, Any]:
    """Days and rows, and one digest of every day's revision and content."""
    contents = [[manifest.day.isoformat(), manifest.revision, manifest.content] for manifest in days]
    return {
        "first_day": days[0].day.isoformat() if days else None,
        "last_day": days[-1].day.isoformat() if days else None,
        "days": len(days),
        "rows": sum(manifest.rows for manifest in days),
        "digest": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
    }


def _row(table: Mapping[str, Any]) -> dict[str, Any]:
    """Of a table of the evaluation what a card holds."""
    names = [name for metric in _METRICS for name in (metric, f"{metric}_interval")]
    methods = {method: {name: table["methods"][method][name] for name in names} for method in _METHODS}
    return {"rows": table["rows"], "users": table["users"], **methods}


def _with_interval(values: Mapping[str, Any], metric: str) -> str:
    bounds = values.get(f"{metric}_interval")
    return _shown(values[metric]) + (f" [{_shown(bounds['low'])}, {_shown(bounds['high'])}]" if bounds else "")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
