"""Many devices that are not there: the real protocol, realistic telemetry, and faults that a seed chooses."""
