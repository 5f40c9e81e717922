"""The library that every op of foveate is defined in."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("foveate", "DEF")
