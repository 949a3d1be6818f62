"""The HTTP application and what surrounds a request.

- `app`: the ASGI application
- `ask`: from a request on the event loop to the averager's thread and back
- `change`: asks the averager to add or remove an average
- `conditional`: conditional requests and cache headers for what never changes
- `description`: an app that describes its errors as what they are
- `listener`: the HTTP listener
- `middleware`: authentication, body limits and request counts
- `openapi`: writes the description of the HTTP API
- `problems`: errors as RFC 9457 problems
- `publish`: asks the averager to publish a run
- `resolve`: from the names in an address to a version, or to the problem that says which of them
- `routes`: one module per resource of the HTTP API
- `schemas`: the JSON of the API as types
- `services`: what the routes work with
"""
