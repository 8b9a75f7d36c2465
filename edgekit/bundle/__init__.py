"""The signed bundle: manifest and content-addressed blobs."""
