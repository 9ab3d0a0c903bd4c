"""The few kinds of panel that the dashboards use, and the frame around them.

Every panel asks the Prometheus that the reader picks in the variable `datasource`, and every query aggregates over replicas
and workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import HeatmapCellLayout, LegendDisplayMode, LegendPlacement, VisibilityMode
from grafana_foundation_sdk.models.dashboard import Dashboard as DashboardModel
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef
from grafana_foundation_sdk.models.dashboard import Panel as PanelModel
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
HALF, WHOLE = 12, 24
HEIGHT = 8
WINDOW = "$__rate_interval"
"""Grafana's own: at least four scrapes, so that a rate is never empty."""


@dataclass(frozen=True)
class Query:
    """A PromQL expression and its legend, in which `{{label}}` is a label of every series that it returns."""

    expr: str
    legend: str


def lines(
    title: str, description: str, *queries: Query, unit: str, top: float | None = None, span: int = HALF
) -> Builder[PanelModel]:
    """A time series of every query; `top` fixes the upper end of the axis, the lower end is 0."""
    panel = timeseries.Panel().title(title).description(description).datasource(PROMETHEUS)
    panel = panel.height(HEIGHT).span(span).unit(unit).min(0).show_points(VisibilityMode.NEVER)
    if top is not None:
        panel = panel.max(top)
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = panel.legend(legend.show_legend(True))
    for ref, query in zip("ABCDEF", queries, strict=False):
        panel = panel.with_target(_target(query, ref).range())
    return panel


def buckets(title: str, description: str, query: Query) -> Builder[PanelModel]:
    """A heatmap of a histogram's buckets; the query keeps the label `le`."""
    panel = heatmap.Panel().title(title).description(description).datasource(PROMETHEUS).height(HEIGHT).span(HALF)
    panel = panel.calculate(False).rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.LE))
    return panel.with_target(_target(query, "A").range().format(PromQueryFormat.HEATMAP))


def rows(title: str, description: str, query: Query, span: int = HALF) -> Builder[PanelModel]:
    """A table of what holds now, a row a series."""
    panel = table.Panel().title(title).description(description).datasource(PROMETHEUS).height(HEIGHT).span(span)
    return panel.with_target(_target(query, "A").instant().format(PromQueryFormat.TABLE))


def board(uid: str, title: str, description: str, panels: Sequence[Builder[PanelModel]]) -> DashboardModel:
    """The panels in reading order, two in a row, the last six hours, refreshed every 30 s."""
    built = dashboard.Dashboard(title).uid(uid).description(description).tags(["limaml"]).readonly()
    built = built.time("now-6h", "now").refresh("30s").timezone("utc").tooltip(DashboardCursorSync.CROSSHAIR)
    built = built.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for panel in panels:
        built = built.with_panel(panel)
    return built.build()


def quantiles(histogram: str, *labels: str) -> tuple[Query, Query]:
    """The median and the 99th percentile of a histogram, one series for each value of `labels`."""
    by, legend = ", ".join((*labels, "le")), "".join(f" {{{{{label}}}}}" for label in labels)
    return tuple(  # type: ignore[return-value]
        Query(f"histogram_quantile({level}, sum by ({by}) (rate({histogram}_bucket[{WINDOW}])))", f"{name}{legend}")
        for level, name in (("0.5", "p50"), ("0.99", "p99"))
    )


def per_second(counter: str, label: str) -> Query:
    return Query(f"sum by ({label}) (rate({counter}[{WINDOW}]))", f"{{{{{label}}}}}")


def age(timestamp: str, *labels: str) -> Query:
    """Seconds since a gauge that holds an instant; a slot that does not serve reads 0, which is none."""
    return Query(f"time() - max by ({', '.join(labels)}) ({timestamp} > 0)", " ".join(f"{{{{{label}}}}}" for label in labels))


def latest(gauge: str, *labels: str, name: str = "") -> Query:
    """A gauge as its last exporter left it, one series for each value of `labels`."""
    aggregated = f"max by ({', '.join(labels)}) ({gauge})" if labels else f"max({gauge})"
    return Query(aggregated, " ".join([*([name] if name else []), *(f"{{{{{label}}}}}" for label in labels)]))


def _target(query: Query, ref: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(ref).datasource(PROMETHEUS).expr(query.expr).legend_format(query.legend)
