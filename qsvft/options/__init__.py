"""Every option declared once, and what there is to choose among; without torch, so that a command answers at once."""
