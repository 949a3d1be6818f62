"""The command line: composes the commands of the rooms, and adds `doctor` and `demo`."""
