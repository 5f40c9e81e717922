"""The demo: `show` runs it; `corpus`, `training` and `cache` make its model on the spot.

The demo downloads nothing, so the training of its model is installed with it.
"""

from foveate.cli.demo.show import run as run
