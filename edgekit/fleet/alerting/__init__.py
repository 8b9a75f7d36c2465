"""Alerts: rules over signals, states that remember, deliveries that arrive, actions that stop a rollout."""
