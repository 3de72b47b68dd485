"""What a text or vision model is: its place, kind and identity, and how it is opened."""
