"""The HTTP API: an ASGI application and its listener.

Modules, from the outside of a request to its inside:

- `listener`: a uvicorn server inside the caller's event loop
- `connection`: one connection, within bounds of size and time
- `app`: the ASGI application: routes, errors and middleware
- `openapi`: writes the description of the API
- `routes`: one module per resource
- `browsers`: middleware against web pages of other sites
- `middleware`: a bearer token, a limit on bodies, a count of responses
- `upstream`: sends clients of the Hugging Face Hub on to another Hub
- `services`: what the routes work with
- `hub`: an average as a repository of the Hugging Face Hub
- `download`: the response that sends one file of a version
- `resolve`: from the names in a path to what they name; links
- `conditional`: preconditions and byte ranges
- `commands`: publish a run, add or remove an average, and wait for the averager's answer
- `problems`: errors as RFC 9457 problems
- `schemas`: the JSON that several resources share, as types
"""
