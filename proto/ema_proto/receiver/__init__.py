"""The server's end of the protocol, sans-IO: header frames, bodies and the time go in, messages and events come out.

- `machine`: `Receiver`: frames in, answers of the averager in
- `events`: what the receiver tells its caller
- `connections`: greets connections, refuses frames, forgets silent connections
- `ownership`: which gang owns which run, probes and take-overs
- `gang`: the sessions of one start of a trainer, one for each rank
- `merging`: the manifests of several ranks, and which rank sends what
- `streaming`: the sessions that stream: how they are admitted, and what they hear of their steps
- `requests`: PUBLISH, REWIND and FINISH, and their answers
- `intake`: what one rank sends: credit, chunks, commits
- `file_intake`: the companion files that come before snapshots
- `assembly`: which step fills which slot, and which ranks' parts are whole
"""
