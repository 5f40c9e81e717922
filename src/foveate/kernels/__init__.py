"""The ops, in a folder a family: `planes` (products with weights), `decoder` (all blocks of a decoder),
`rounding` (codes of weights), `collect` (statistics), `convert` (forms of what moves), `saved` (tensors).

In each family `ops.py` defines the schemas, and `reference.py` defines their meaning in plain torch. `backends/` has
the kernels of each device, and one table of them. The C++ of the CPU is in `backends/cpu/csrc`, again a folder for each
family.
"""
