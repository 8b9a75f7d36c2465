"""Target profiles: load by name, check, probe this machine."""
