"""What every room uses: files, processes, settings, and what a repository holds."""
