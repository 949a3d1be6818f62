"""The thread that sends snapshots, and its socket.

- `driver`: the thread that owns the connection
- `link`: the DEALER socket
- `shared_state`: what the training thread and the connection's thread both see
- `transfers`: the thread that waits for copies which go on while training does, and then has them s
- `transport`: what a session's snapshots go through, in this order
- `worker`: the training thread's end of the session
"""
