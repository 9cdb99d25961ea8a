"""Storage of bytes: local files and object stores behind one interface, retries, and a cache on the local disk."""
