"""Evidence that travels with a release: model signature, bill of materials, provenance, model card."""
