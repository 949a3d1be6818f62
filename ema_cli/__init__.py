"""The command `ema`: collects the commands of the server and the reader, and adds `doctor` and `demo`."""
