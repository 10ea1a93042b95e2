"""What is kept: models, lineage, content-addressed blobs."""
