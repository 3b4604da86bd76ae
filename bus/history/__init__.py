"""Looking back: the streams are the event store."""
