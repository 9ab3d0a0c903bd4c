"""The Grafana dashboards as typed code: `python -m helm.dashboards` writes their JSON into the chart."""
