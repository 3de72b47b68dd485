"""The small data set of the quickstart: captioned drawings and WordNet glosses (see README.md)."""
