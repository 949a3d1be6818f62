"""The server's end of the protocol, sans-IO: header frames, bodies and the time go in, messages and events come out.

- `machine`: `Receiver`, which all other modules serve
- `events`: what the receiver tells its caller
- `connections`: greets connections, refuses frames, forgets silent connections
- `ownership`: which session owns which run, probes and take-overs
- `intake`: the snapshots of one joined session: slots, credit, commits
- `file_intake`: the companion files that come before them
"""
