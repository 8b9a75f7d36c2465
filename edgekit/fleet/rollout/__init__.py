"""Rollouts: a release brought to a part of the fleet in waves, with gates, and taken back when they say no."""
