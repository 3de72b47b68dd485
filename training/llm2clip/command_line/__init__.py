"""What every command has: settings and options, logs, progress bars, tables, and the processes that it runs on."""
