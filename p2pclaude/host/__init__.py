"""What a long-running process needs of its machine: the data directory, the log, other processes, systemd."""
