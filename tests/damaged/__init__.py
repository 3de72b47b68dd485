"""One harness of damaged and hostile files: doors (readers of files) times damages; see docs/reliability.md."""
