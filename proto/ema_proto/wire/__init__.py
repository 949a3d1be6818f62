"""Messages, the manifest, and their bytes. Payloads of chunks are never touched here.

- `messages`: all messages as frozen values
- `body`: JSON bodies, and the kinds of values that a message's fields may have
- `boxes`: the pieces of tensors that ranks hold
- `manifest`: the tensors of a snapshot and their layout in one flat buffer
- `files`: companion files of a run: names, sizes and digests
- `parts`: which tensors a rank sends
- `slot_offer`: the packet by which slots in shared memory are passed
- `codec`: messages to frames and back
- `chunks`: cutting a flat buffer into chunks, and recording which have arrived
"""
