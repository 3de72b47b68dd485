"""Serving: an endpoint for embeddings of texts and images, and for searches of an index."""
