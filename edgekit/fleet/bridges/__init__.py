"""Bridges: what the fleet server knows, told to other systems in their own words. Each is optional and a process of its own."""
