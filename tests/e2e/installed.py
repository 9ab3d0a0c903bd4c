"""Where an installation of the generated world keeps its state and listens: all of it below one folder, on given ports."""

from pathlib import Path
from typing import Any

from limaml.config import Config, load

ROOT = Path(__file__).parents[2]


def installed(run: Path, ports: list[int], **others: Any) -> Config:
    """`ports` are those of Airflow, MLflow and the service; no dashboards, unless `local_prometheus_port` is given."""
    airflow, mlflow, service = ports
    values = {
        "local.run_root": run,
        "local.airflow_port": airflow,
        "local.mlflow_port": mlflow,
        "serving.port": service,
        "local.prometheus_port": 0,
        "storage.root": run / "data",
        "monitoring.textfile_dir": run / "metrics",
        "serving.log_path": run / "requests",
        "training.storage_path": run / "ray_results",
        "registry.tracking_uri": f"sqlite:///{run}/mlflow/mlflow.db",
        "registry.artifact_root": run / "mlflow" / "artifacts",
        "feast.registry": run / "feast" / "registry.db",
        "feast.online_connection": run / "feast" / "online.db",
        "embeddings.lease_url": f"sqlite:///{run}/lease.db",
    } | {name.replace("_", ".", 1): value for name, value in others.items()}
    return load(ROOT / "configs" / "synthetic.toml", [f"{key}={value}" for key, value in values.items()])
