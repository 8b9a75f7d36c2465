"""The update repository: TUF metadata and blobs."""
