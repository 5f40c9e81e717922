"""Memory: where planes are while a model runs, what is free, and giving memory back.

blocks     arena: blocks on huge pages; allocator: what glibc keeps; available: what is free
values     runs: the pieces that come and go; reservation: their addresses; held: both, and where they are read from
places     file and host places, which read a run and compare it with its checksum
deciders   policy: what is hot; limits: following the memory that is free. Pure
doing it   mover: background reads; residency: changes between two passes; report: what became of it
convert    what changes its form while it moves
"""
