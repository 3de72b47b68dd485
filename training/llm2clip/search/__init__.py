"""Search: images as an index of embeddings, and what in it fits a text or an image."""
