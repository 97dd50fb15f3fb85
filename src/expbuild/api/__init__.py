"""Wire to domain and back: one servicer per file, the status table, resource names, compression."""
