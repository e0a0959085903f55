"""Where `add_remote_code` is imported from."""

from .swap.remote_code import add_remote_code as add_remote_code
