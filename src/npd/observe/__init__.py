"""Metrics, traces, the live view and the report of a run. Loads no model and no torch."""
