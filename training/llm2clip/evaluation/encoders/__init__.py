"""Models under evaluation, of whatever library: images and texts in one space."""
