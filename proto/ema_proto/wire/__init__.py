"""Messages, the manifest, and their bytes.

- `bodies`: jSON bodies
- `chunks`: cutting a flat buffer into chunks, and knowing which of them have arrived
- `codec`: messages to frames and back
- `fields`: reading the fields of a message that a stranger wrote
- `manifest`: what a snapshot looks like
- `messages`: all messages under one name, as the machines use them
- `server_messages`: messages from server to trainer
- `trainer_messages`: messages from trainer to server, and the HEARTBEAT that both send
"""
