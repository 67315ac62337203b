"""The mathematics: imports torch only."""
