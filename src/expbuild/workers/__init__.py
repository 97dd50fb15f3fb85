"""How to run one command in one prepared directory. Knows nothing of the CAS, gRPC or the queue."""
