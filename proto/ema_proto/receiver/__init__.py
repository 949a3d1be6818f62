"""The server's end of the protocol."""
