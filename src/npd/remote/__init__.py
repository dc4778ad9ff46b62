"""Runs on several machines without a shared disk: artifacts go through an object store."""
