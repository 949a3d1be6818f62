"""The server's end of the protocol.

- `claims`: which session owns which run, and who waits for it
- `connections`: the connections of a server
- `events`: what the receiver tells its caller
- `intake`: snapshots of one joined session on one connection
- `machine`: the server's end of the protocol as a machine
- `ownership`: who owns a run
"""
