"""The shipped studies, every value commented."""
