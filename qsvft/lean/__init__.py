"""What else makes a training step lean; each usable by itself."""
