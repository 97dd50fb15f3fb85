"""The life of an action: queue, assignment, inputs, outputs, results. Knows nothing of gRPC."""
