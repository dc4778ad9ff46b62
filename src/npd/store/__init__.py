"""What a run leaves on disk: layout, Arrow shards, model snapshots, and the SQLite ledger.

Everything here is either whole or absent, whatever kills the process. Imports nothing by itself, so
that the ledger can be read without loading Arrow.
"""
