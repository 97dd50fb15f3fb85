"""Blobs and action results, in files or in memory. Knows nothing of gRPC, workers or scheduling."""
