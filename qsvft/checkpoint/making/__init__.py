"""Units of work, and the directory that they go into."""
