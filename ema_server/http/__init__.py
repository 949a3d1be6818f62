"""The HTTP side: turns the catalog, the board and the metric store into responses. It never writes an average."""
