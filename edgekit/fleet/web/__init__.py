"""The pages: rendered on the server, kept live by events, nothing loaded from anywhere else."""
