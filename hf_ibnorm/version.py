"""The one place the version is written; read by setuptools without importing the package."""

__version__ = "0.1.0"
