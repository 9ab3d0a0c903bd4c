"""Airflow's side: assets, one operator that runs a CLI verb, the DAGs. Wiring only; the work is behind `limaml <verb>`."""
