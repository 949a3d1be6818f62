"""The trainer's end of the protocol, sans-IO: commands, frames and the time go in, frames and events come out.

- `machine`: `Sender`, which all other modules serve
- `events`: what the sender tells its caller
- `send_queue`: unanswered snapshots and requests, in order, and the credit for chunks
- `file_queue`: companion files that the server lacks
- `timeouts`: when to give a connection up, and when to send a heartbeat
"""
