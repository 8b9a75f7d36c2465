"""The fleet server: ingest, store, API, dashboard."""
