"""Search: an index of image embeddings, and the images in it that match a text or an image."""
