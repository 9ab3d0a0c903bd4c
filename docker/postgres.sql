-- Run once, on an empty volume. Airflow's database is POSTGRES_DB; `limaml` has Feast's registry and the lease.
CREATE DATABASE mlflow;
CREATE DATABASE limaml;
