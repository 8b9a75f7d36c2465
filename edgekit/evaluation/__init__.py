"""Quality of a model on data, measured through a ``runtime.Session``."""
