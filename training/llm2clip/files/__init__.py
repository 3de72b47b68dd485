"""Files: atomic writes, locks, lists of what a folder contains, and paths on remote stores."""
