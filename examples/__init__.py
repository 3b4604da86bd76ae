"""Short applications; each says in its head how it is run."""
