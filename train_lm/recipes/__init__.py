"""The shipped recipes, every value commented."""
