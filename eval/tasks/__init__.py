"""The embedded tasks; origins and licences are in SOURCES.md."""
