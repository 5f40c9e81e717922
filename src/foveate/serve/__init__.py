"""The server: OpenAI's routes on transformers' serving, and a precision that bends under load instead of the latency.

    body -> fields (checked) -> admission -> engine (continuous batching) -> text -> answer
                                    |             | between two steps: the manager, floors, and the tier of each row

The engine is transformers' continuous batching, and the app begins as that of `transformers serve`. What is foveate's
own: each row of a batch is read at the precision that its request asks for, the runtime manager moves all others along
the frontier, and every answer says what it got. Nothing here is imported by `import foveate`.
"""
