"""Predicted peaks against steps that were run again with those payloads, and against torch's own tracker."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from foveate.activations.memory.peak import PeakTracker, Token
from foveate.activations.memory.timeline import Timeline

BATCH = 64


@dataclass(eq=False)
class Packed:
    """A payload of 4, 8, 16 or 32 bits: the values' magnitudes do not matter here, their bytes do."""

    parts: tuple[Tensor, ...]
    shape: torch.Size
    bits: int
    token: Token | None = None

    def values(self) -> Tensor:
        if self.bits == 32:
            return self.parts[0]
        if self.bits == 16:
            return self.parts[0].float().view(self.shape)
        values = torch.empty(self.shape)
        flat = values.view(-1)
        flat.zero_()
        flat[:: 8 // self.bits].copy_(self.parts[0])
        return values


def pack(tensor: Tensor, bits: int) -> Packed:
    flat = tensor.detach().reshape(-1)
    if bits == 32:
        return Packed((tensor.detach(),), tensor.shape, bits)
    part = flat.to(torch.bfloat16) if bits == 16 else flat[:: 8 // bits].to(torch.uint8)
    return Packed((part,), tensor.shape, bits)


def bytes_at(original: int, bits: int) -> int:
    return original * bits // 32


@contextmanager
def storing(bits_of: Callable[[str], int], tracker: PeakTracker | None) -> Iterator[None]:
    count = 0

    def on_pack(tensor: Tensor) -> Packed | Tensor:
        nonlocal count
        if tensor.is_leaf or tensor.numel() < 1024:
            return tensor
        name = f"site{count}"
        count += 1
        packed = pack(tensor, bits_of(name))
        if tracker is not None:
            packed.token = tracker.stored(name, packed.parts, tensor)
            weakref.finalize(packed, packed.token.release)
        return packed

    def on_unpack(packed: Packed | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values = packed.values()
        if tracker is not None and packed.token is not None:
            tracker.restored(packed.token, values)
        return values

    with torch.autograd.graph.saved_tensors_hooks(on_pack, on_unpack):
        yield


def stack() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256)]
    return nn.Sequential(*layers), torch.randn(BATCH * 8, 256)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), torch.randn(
        BATCH, 3, 16, 16
    )


class Residual(nn.Module):
    """Keeps its input alive while its branch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def residual() -> tuple[nn.Module, Tensor]:
    return Residual(), torch.randn(BATCH * 8, 128)


MODELS = [stack, convolutions, residual]


def run(model: nn.Module, x: Tensor, bits_of: Callable[[str], int], tracker: PeakTracker) -> Timeline:
    model.zero_grad(set_to_none=True)
    with tracker, storing(bits_of, tracker):
        loss = model(x).square().mean()
        loss.backward()
        del loss
    return tracker.timeline()


def step(make: Callable[[], tuple[nn.Module, Tensor]], bits_of: Callable[[str], int]) -> Timeline:
    model, x = make()
    gc.collect()
    return run(model, x, bits_of, PeakTracker([*model.parameters(), *model.buffers(), x]))


def torchs_peak(make: Callable[[], tuple[nn.Module, Tensor]], bits_of: Callable[[str], int]) -> int:
    model, x = make()
    tracker = MemTracker()
    tracker.track_external(model, x)
    with tracker, storing(bits_of, None):
        loss = model(x).square().mean()
        loss.backward()
        del loss
    found: Mapping[torch.device, Mapping[str, int]] = tracker.get_tracker_snapshot("peak")
    return found[torch.device("cpu")]["Total"]


MIXES: Mapping[str, Callable[[str], int]] = {
    "4": lambda _: 4,
    "8": lambda _: 8,
    "16": lambda _: 16,
    "32": lambda _: 32,
    "mixed": lambda name: (4, 32, 8, 16)[int(name.removeprefix("site")) % 4],
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_peak_is_torchs(make: Callable[[], tuple[nn.Module, Tensor]], mix: str) -> None:
    found, expected = step(make, MIXES[mix]).peak({}), torchs_peak(make, MIXES[mix])
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("recorded", ["8", "32", "mixed"])
@pytest.mark.parametrize("mix", MIXES)
def test_other_payloads_have_the_peak_that_was_predicted(
    make: Callable[[], tuple[nn.Module, Tensor]], recorded: str, mix: str
) -> None:
    timeline = step(make, MIXES[recorded])
    sizes = {name: bytes_at(size, MIXES[mix](name)) for name, size in timeline.original.items()}
    again = step(make, MIXES[mix])
    assert again.original == timeline.original
    assert again.stored == sizes
    assert timeline.peak(sizes) == pytest.approx(again.peak({}), rel=0.03)


@pytest.mark.parametrize("make", MODELS)
def test_fake_tensors_count_as_real_ones(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    real = step(make, MIXES["8"])
    with FakeTensorMode():
        fake = step(make, MIXES["8"])
    assert fake == real


def test_recording_changes_no_gradient() -> None:
    model, x = stack()
    run(model, x, lambda _: 32, PeakTracker())
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_what_was_there_before_is_counted_from_the_start() -> None:
    weight = torch.randn(1000)
    with PeakTracker() as tracker:
        first = torch.empty(500)
        del first
        second = weight * 2
    del second
    timeline = tracker.timeline()
    assert timeline.peak({}) == 8000
    assert PeakTracker([weight, weight.view(10, 100)]).timeline().peak({}) == 4000


def test_a_resized_storage_counts_as_it_is() -> None:
    with PeakTracker() as tracker:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        torch.zeros(10).add_(1)
        x.untyped_storage().resize_(40_000)
        x.add_(1)
    assert tracker.timeline().peak({}) == 40_000


def test_a_payload_ends_when_it_is_released_or_its_storage_is_gone() -> None:
    with PeakTracker() as tracker:
        x = torch.randn(1000)
        kept = torch.zeros(100)
        one = tracker.stored("one", [kept], x)
        two = tracker.stored("two", [torch.zeros(50)], x)  # nobody keeps it
        del x
        one.release()
        one.release()
        y = torch.randn(3000)
        del kept, y
    timeline = tracker.timeline()
    assert timeline.original == {"one": 4000, "two": 4000}
    assert timeline.stored == {"one": 400, "two": 200}
    assert not two.alive
    assert timeline.peak({}) == 12_400
    # released, it is no payload any more: however small it might have been, its memory is there
    assert timeline.peak({"one": 0, "two": 0}) == 12_400
    # while it was alive the original was there too, or it alone
    assert timeline.peak({"one": 100_000}) == 12_400
    assert timeline.peak({"one": 3_999}) == 12_400


def test_a_site_that_stores_twice_shares_its_bytes() -> None:
    with PeakTracker() as tracker:
        first, second = torch.randn(3000), torch.randn(1000)
        payloads = [torch.zeros(750, dtype=torch.uint8), torch.zeros(250, dtype=torch.uint8)]
        tokens = [tracker.stored("site", [p], x) for p, x in zip(payloads, (first, second), strict=True)]
        del first, second
        big = torch.zeros(5000)
        tokens[0].release()
        del payloads[0], big
    timeline = tracker.timeline()
    assert timeline.stored == {"site": 1000}
    assert timeline.original == {"site": 16_000}
    assert timeline.peak({}) == 21_000
    assert timeline.peak({"site": 2000}) == 22_000
    assert timeline.peak({"site": 16_000}) == 36_000


def test_after_the_step_nothing_is_recorded() -> None:
    with PeakTracker() as tracker:
        x = torch.randn(1000)
        token = tracker.stored("site", [x], x)
    before = tracker.timeline()
    tracker.restored(token, x)
    token.release()
    tracker.stored("other", [torch.zeros(5)], x)
    del x
    assert tracker.timeline() == before


def test_sparse_tensors_and_subclasses_count_by_what_they_hold() -> None:
    with PeakTracker() as tracker:
        embedding = nn.Embedding(100, 8, sparse=True)
        embedding(torch.arange(4)).sum().backward()
        gradient = embedding.weight.grad
        assert gradient is not None
        assert gradient.is_sparse
    # the weight, and of the gradient: indices and values
    assert tracker.timeline().other[-1] >= 3200 + 4 * 8 + 4 * 32
