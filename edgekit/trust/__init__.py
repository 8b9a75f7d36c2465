"""Keys, signatures, update metadata and anti-rollback floors: bytes in, verdict out."""
