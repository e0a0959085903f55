"""What everything else stands on; imports nothing else of this project but `checks`."""
