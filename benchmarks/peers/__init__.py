"""Peers: other libraries that do the same work, each in its own environment and process.

`environments` builds a virtual environment for each, with pinned versions, and keeps it in the user's cache.
`child` starts a script of `scripts/` with that environment's Python and exchanges lines of JSON with it. So foveate and
its peers take turns in one run on one machine. The scripts import nothing of foveate.

`speed/` times one linear layer of every library, and a whole model beside llama.cpp. `quality/` rounds the same models
with every library at equal bytes. `quantizing/` measures the time and memory that quantizing takes.
"""
