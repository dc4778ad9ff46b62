"""Metrics, traces, the live view and the report of a run. Imports no other room."""
