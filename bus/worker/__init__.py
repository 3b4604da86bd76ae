"""The way out: what runs in a worker process."""
