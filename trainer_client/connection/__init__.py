"""The connection to the server, and the threads that use it.

- `worker`: a session, as the training thread uses it
- `transfers`: the thread that sends snapshots once their copies are done
- `shared_state`: what the training thread and the connection's thread both see
- `driver`: the thread that owns the connection
- `link`: the ZeroMQ socket
- `local_socket`: the unix socket of a server on the same machine, which gets the slots by it
- `addresses`: the addresses behind an endpoint, and what listens there
"""
