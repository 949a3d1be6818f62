"""The commands that read from a server.

- `averages`: commands about averages
- `commands`: the commands that read
- `derived`: commands that have versions made of others
- `evaluate`: the commands that evaluate
- `options`: what the commands that read have in common
- `render`: values as lines of text for people, and as JSON for programs
"""
