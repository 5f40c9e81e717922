"""Sends layers to a peer in its own process, and reads its results: float32 matrices and the bytes of its format.

Weights, moments and tokens are passed in files of numpy arrays, which every peer's environment can read. Their folder
exists as long as the model is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models.cases import Case
from benchmarks.peers.child import SCRIPTS, Child, PeerError
from benchmarks.peers.environments import ENVIRONMENTS
from benchmarks.peers.quality.layers import Layers
from benchmarks.peers.quality.settings import Setting

#: Seconds for one setting of one model: auto-round trains every block.
LIMIT_S = 3600.0


@dataclass(frozen=True, eq=False)
class Work:
    """One model's layers. Files for the peers are written when they are first needed.

    Attributes:
        folder: the folder of the files.
        case: the case whose calibration data round whole models.
        model: the float model, with the embeddings that both sides have.
        layers: the layers to be rounded.
    """

    folder: Path
    case: Case
    model: nn.Module
    layers: Layers

    @cached_property
    def matrices(self) -> dict[str, Any]:
        """The arguments of `round_matrices.py` that name files."""
        files = {"weights": self.folder / "weights.npz", "moments": self.folder / "moments.npz"}
        _write(files["weights"], self.layers.weights)
        _write(files["moments"], self.layers.moments)
        return {name: str(file) for name, file in files.items()}

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The arguments of `round_models.py` that name files; raises `PeerError` if the model is no transformer."""
        prefix, inner = self._transformer
        tokens = self.folder / "tokens.npz"
        arrays: dict[str, Tensor] = {}
        for i, (ids_BS, mask_BS) in enumerate(_tokens(self.case.calibration)):
            arrays |= {f"ids_{i}": ids_BS, f"mask_{i}": mask_BS}
        _write(tokens, arrays)
        cast(Any, inner).save_pretrained(self.folder / "model")
        return {
            "model": str(self.folder / "model"),
            "kind": type(inner).__name__,
            "tokens": str(tokens),
            "names": [name.removeprefix(prefix) for name in self.layers.weights],
        }

    @cached_property
    def _transformer(self) -> tuple[str, nn.Module]:
        """The outermost part that transformers can write to a folder, and the prefix of its names."""
        for name, module in self.model.named_modules():
            if hasattr(module, "save_pretrained"):
                return (f"{name}." if name else ""), module
        raise PeerError("it takes transformers only, and this model is none")

    def read(self, file: Path, whole: bool) -> dict[str, Tensor]:
        """The matrices that a peer wrote; raises `PeerError` unless there is a finite one for every layer."""
        prefix = self._transformer[0] if whole else ""
        with np.load(file, allow_pickle=False) as held:
            dense = {prefix + name: torch.from_numpy(held[name]) for name in held.files}
        for name, w_NK in self.layers.weights.items():
            if name not in dense or dense[name].shape != w_NK.shape or not bool(torch.isfinite(dense[name]).all()):
                raise PeerError(f"{name} did not come back as a finite matrix of shape {tuple(w_NK.shape)}")
        return dense


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    arrays: dict[str, Any] = {name: t.numpy() for name, t in tensors.items()}
    np.savez(file, **arrays)


def _tokens(batches: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) [B, S] of every batch of tokens. A batch of sentences is a list of chunks."""
    pairs = []
    for batch in batches:
        if isinstance(batch, Tensor):
            pairs.append((batch, torch.ones_like(batch)))
        elif isinstance(batch, Mapping) and "chunks" in batch:
            pairs += [(chunk["input_ids"], chunk["attention_mask"]) for chunk in batch["chunks"]]
        else:
            raise PeerError(f"it takes batches of tokens, and these are of {type(batch).__name__}")
    return pairs


class Peers:
    """The peers' processes: one per script and environment, started when first needed, kept until the end."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, str], Child] = {}
        self._versions: dict[str, str] = {}

    def round(self, setting: Setting, work: Work) -> tuple[dict[str, Tensor], int]:
        """The weights of a model's layers as the peer rounds them, and the bytes of its format.

        Raises:
            PeerError: there is no environment for it, or it failed.
        """
        given = work.whole if setting.whole else work.matrices
        out = work.folder / "out.npz"
        child = self._child(setting)
        try:
            answer = child.ask("round", form=setting.peer, out=str(out), **setting.arguments, **given)
        except PeerError:
            self._children.pop((setting.environment, setting.script)).close()  # the next setting may be one it can do
            raise
        self._versions[setting.peer] = str(answer["version"])
        try:
            return work.read(out, setting.whole), int(answer["bytes"])
        finally:
            out.unlink()

    def _child(self, setting: Setting) -> Child:
        key = (setting.environment, setting.script)
        if key not in self._children:
            self._children[key] = Child(setting.peer, self._python(setting), SCRIPTS / setting.script, LIMIT_S)
        return self._children[key]

    def _python(self, setting: Setting) -> Path:
        environment = ENVIRONMENTS[setting.environment]
        if not environment.built:
            raise PeerError("there is no environment for it: `make bench-peers` makes it")
        return environment.python

    def versions(self) -> list[str]:
        """A note on the version of every library that answered."""
        return [f"{peer} {version}" for peer, version in sorted(self._versions.items())]

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.close()
