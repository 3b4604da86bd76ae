"""What attaches to telemetry: one file per library, none of them known to the core."""
