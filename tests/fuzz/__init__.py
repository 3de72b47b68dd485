"""Damaged files by the thousand, for every reader of files that come from elsewhere."""
