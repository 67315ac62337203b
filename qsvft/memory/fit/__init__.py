"""Settings for a card."""
