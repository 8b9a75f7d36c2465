"""How a fleet database of an older edgekit becomes one of today's."""
