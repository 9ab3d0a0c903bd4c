"""What the DAGs produce, for lineage in Airflow's UI. Nothing is scheduled by them: days are passed in, never derived."""

from airflow.sdk import Asset

EVENTS = Asset("limaml_events", uri="limaml://events")
MODEL = Asset("limaml_model", uri="limaml://model")
EMBEDDINGS = Asset("limaml_embeddings", uri="limaml://embeddings")
