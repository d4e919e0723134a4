"""Measuring commands: they start the real server, talk HTTP to it, and end in one line of JSON."""
