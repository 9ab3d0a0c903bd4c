"""Offline protocols, rivals, the promotion gate and the report."""
