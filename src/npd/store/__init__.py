"""The run directory: its layout, Arrow shards, model snapshots, and the SQLite ledger.

Every file is complete or absent, even if the process is killed. Imports nothing itself, so that the
ledger can be read without loading Arrow.
"""
