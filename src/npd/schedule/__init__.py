"""Decides what a run does next, from its events: no I/O, no clock, no tensor."""
