"""What is kept of old classes, and how much of it is replayed."""
