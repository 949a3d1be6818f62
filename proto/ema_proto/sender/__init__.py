"""The trainer's end of the protocol.

- `events`: what the sender tells its caller
- `handshake`: the sender's side of a greeting
- `machine`: the trainer's end of the protocol as a machine
- `send_queue`: what the sender still owes the server, in order
- `timeouts`: how long the sender waits for what, and when it says that it is alive
"""
