"""The commands that read from a server."""
