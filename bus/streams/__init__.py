"""Everything that speaks Redis: key names, the wire format, connections, scripts, verbs."""
