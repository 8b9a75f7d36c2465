"""The records that one process writes and another reads; nothing else."""
