"""The peers: the same work done by other libraries, each in an environment and a process of its own.

`environments` builds a virtual environment for each, with pinned versions, and keeps it in the user's cache.
`child` starts a script of `scripts/` with that environment's Python and talks to it in lines of JSON, so that ours and
theirs take turns in one run, on one machine, in one hour. The scripts import nothing of foveate.

`speed/` times one linear layer of every library, and a whole model against llama.cpp; `quality/` rounds the same
models with each at equal bytes.
"""
