"""The on-device agent: update, serve, report."""
