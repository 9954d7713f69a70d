"""Memory of old classes: prototype bank, exemplars, and the replay plan."""
