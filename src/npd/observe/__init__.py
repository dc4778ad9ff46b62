"""What a run leaves for people: metrics, traces, a live view and a report. Imports no room."""
