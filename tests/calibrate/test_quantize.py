"""quantize: any module, in place, and what it refuses leaves the model as it was."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.calibrate.one_weight import group_for
from foveate.errors import DataError, FoveateError, SiteError, WeightError
from foveate.nn.modules import PlaneConv, PlaneEmbedding, PlaneLinear
from tiny import llama, mlp, quantized_llama, rows, tokens


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _steps(
    model: nn.Module, original: nn.Module, batch: Any, profile: fv.Profile, field: Callable[[Any], Tensor]
) -> None:
    """The error falls with the level, to a few per cent at 8 bits."""
    with torch.no_grad():
        expected = field(original(**batch) if isinstance(batch, dict) else original(batch))
        errors = []
        for level in (2, 3, 4, 6, 8):
            fv.apply(model, profile.uniform(level, 16))
            got = field(model(**batch) if isinstance(batch, dict) else model(batch))
            errors.append(_relative(got, expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05, errors
    assert errors[0] > 4 * errors[-1], errors


def test_sequential() -> None:
    model = mlp()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, rows(), progress=False)
    assert [type(m) for m in model] == [PlaneLinear, nn.ReLU, PlaneLinear, nn.ReLU, PlaneLinear]
    assert [s.name for s in profile.sites] == ["0:weight", "2:weight", "4:weight", "0:input", "2:input", "4:input"]
    assert fv.current_map(model) == profile.uniform(8)
    assert profile.samples == 64
    _steps(model, original, rows(seed=9)[0], profile, lambda y: y)


def test_llama() -> None:
    original = llama()
    model, profile = quantized_llama()
    assert isinstance(fv.profile_of(model), fv.Profile)
    assert profile.objective == "logits"
    batch = tokens(seed=4)[0]
    _steps(model, original, batch, profile, lambda y: y.logits)
    fv.apply(model, profile.uniform(8))
    out = model.generate(
        batch["input_ids"][:1], max_new_tokens=5, do_sample=False, attention_mask=torch.ones(1, 12, dtype=torch.long)
    )
    assert out.shape[1] <= 17
    assert model.lm_head.weight.shape == (50, 32)


def test_bert() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
    )
    model = BertModel(config).eval()
    original = copy.deepcopy(model)
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in tokens()]
    batches[0]["attention_mask"][1, 5:] = 0
    profile = fv.quantize(model, batches, progress=False)
    assert profile.objective == "embedding"
    _steps(model, original, batches[0], profile, lambda y: y.pooler_output)


def test_gpt2_with_a_tied_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, tokens(), progress=False)
    tied = next(s for s in profile.sites if s.aliases)
    assert (tied.name, tied.aliases) == ("transformer.wte:weight", ("lm_head:weight",))
    assert tied.rows_read == tied.rows
    assert model.lm_head.weight is model.transformer.wte.weight
    attention = model.transformer.h[0].attn.c_attn
    assert (type(attention), attention.in_features, attention.out_features) == (PlaneLinear, 32, 96)
    # both uses of the tied weight count
    assert len([s for s in profile.sites if s.kind == "weight"]) == 2 + 2 * 4
    _steps(model, original, tokens(seed=5)[0], profile, lambda y: y.logits)
    fv.apply(model, profile.uniform(8).with_level("lm_head:weight", 2))
    assert int(model.transformer.wte.weight.value.active_levels.max()) == 2


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, (1, 3), padding="same", groups=2, dilation=2)
        self.point = nn.Conv2d(24, 8, 1, padding_mode="circular")
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.depthwise(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.point(torch.tanh(self.grouped(x)))).mean((-2, -1)))


def test_convolutions() -> None:
    model = _Net()
    original = copy.deepcopy(model).eval()
    batches = list(torch.randn(16, 3, 9, 11).split(8))
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    assert [type(m).__name__ for m in (model.stem, model.depthwise, model.grouped, model.point)] == ["PlaneConv"] * 4
    assert next(s for s in profile.sites if s.name == "depthwise:weight").rows == 16
    assert next(s for s in profile.sites if s.name == "depthwise:weight").columns == 9
    model.eval()
    _steps(model, original, batches[0], profile, lambda y: y)
    # one image without a batch, none at all, and bfloat16
    one = model.stem(batches[0][0])
    assert torch.allclose(one, model.stem(batches[0][:1])[0])
    assert model.stem(batches[0][:0]).shape == (0, 16, 5, 6)
    assert model.grouped(torch.randn(2, 16, 5, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv1d(4, 20, 5, stride=2, padding=3), lambda: nn.Conv1d(4, 20, 3, groups=2)]
)
def test_one_dimensional_convolutions(make: Callable[[], nn.Conv1d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten())
    original = copy.deepcopy(model)
    batches = [torch.randn(6, 4, 30)]
    profile = fv.quantize(model, batches, progress=False)
    assert isinstance(model[0], PlaneConv)
    _steps(model, original, batches[0], profile, lambda y: y)
    x = batches[0][0]
    assert model[0](x).shape == original[0](x).shape


def test_every_parameter_that_is_not_a_weight_stays() -> None:
    model = _Net()
    before = {n: p.clone() for n, p in model.named_parameters() if "bias" in n or "norm" in n}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    fv.quantize(model, [torch.randn(4, 3, 9, 9)], objective=fv.Logits(), progress=False)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in buffers.items())


def test_skip() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), skip="2", progress=False)
    assert type(model[2]) is nn.Linear
    assert model[2].weight.requires_grad
    assert "2 was left as it is" in profile.notes
    with pytest.raises(SiteError, match=r"pattern 'nothing\*' in skip matches none of 3 modules"):
        fv.quantize(mlp(), rows(), skip=["nothing*"], progress=False)
    with pytest.raises(WeightError, match="skip leaves no weight"):
        fv.quantize(mlp(), rows(), skip=["*"], progress=False)


def _broken(change: Callable[[nn.Sequential], Any]) -> nn.Sequential:
    model = mlp()
    with torch.no_grad():
        change(model)
    return model


def test_what_a_profile_keeps_of_an_embedding_and_of_tied_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    original = copy.deepcopy(model)
    batch = tokens(batches=1)[0]
    profile = fv.quantize(model, [batch], progress=False)
    ids = batch["input_ids"].flatten()
    tied = profile.statistics["transformer.wte:weight"]
    strips = torch.bincount(ids // 16, minlength=4).float() / len(ids)
    assert torch.allclose(tied["row_frequency"], strips)
    with torch.no_grad():
        output = original(**batch, output_hidden_states=True)
        rows_read = original.transformer.wte(ids)
    low, high = (float(v) for v in tied["output_range"])
    assert low == pytest.approx(min(float(output.logits.min()), float(rows_read.min())), rel=1e-4)
    assert high == pytest.approx(max(float(output.logits.max()), float(rows_read.max())), rel=1e-4)
    energy = output.hidden_states[-1].flatten(0, 1).square().mean()
    assert torch.allclose(tied["input_energy"], energy, rtol=1e-4)
    positions = profile.statistics["transformer.wpe:weight"]
    assert "input_energy" not in positions
    read = original.transformer.wpe.weight.detach()[: batch["input_ids"].shape[1]]
    assert torch.allclose(positions["output_range"], torch.stack([read.min(), read.max()]))


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[Any], type[Exception], str]] = {
    "NaN": (
        lambda: _broken(lambda m: m[2].weight[3, 4].fill_(float("nan"))),
        rows(),
        WeightError,
        "2.weight holds NaN or Inf",
    ),
    "Inf": (
        lambda: _broken(lambda m: m[4].weight[0, 0].fill_(float("inf"))),
        rows(),
        WeightError,
        "4.weight holds NaN or Inf",
    ),
    "too large": (lambda: _broken(lambda m: m[2].weight[3, 4].fill_(1e6)), rows(), WeightError, "2: weight"),
    "8-bit floats": (
        lambda: mlp().to(torch.float8_e4m3fn),
        rows(),
        WeightError,
        "0.weight is torch.float8_e4m3fn: load the model in float16",
    ),
    "no data": (mlp, [], DataError, "there are no batches"),
    "NaN data": (
        mlp,
        [*rows(), torch.full((2, 70), float("nan"))],
        DataError,
        "batch 2 gives a loss that is not finite",
    ),
    "no weights": (
        lambda: nn.Sequential(nn.LayerNorm(70)),
        rows(),
        WeightError,
        "Sequential has no weight that can be quantized",
    ),
    "a bare layer": (lambda: nn.Linear(70, 5), rows(), WeightError, "is itself a single layer"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_refused_leaves_the_model_as_it_was(what: str, training: bool) -> None:
    make, batches, error, message = REFUSED[what]
    model = make().train(training)
    list(model.parameters())[-1].requires_grad_(False)
    kinds = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fv.quantize(model, batches, progress=False)
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    now = model.state_dict()
    assert all(torch.equal(t.float().nan_to_num(7), now[n].float().nan_to_num(7)) for n, t in tensors.items())
    assert now.keys() == tensors.keys()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(FoveateError, match="not quantized"):
        fv.current_map(model)


def test_an_exception_of_the_model_or_the_data_restores_it_too() -> None:
    def failing() -> Iterator[Tensor]:
        yield rows()[0]
        raise KeyboardInterrupt

    model = mlp().train()
    with pytest.raises(KeyboardInterrupt):
        fv.quantize(model, failing(), progress=False)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError):
        fv.quantize(model, [torch.randn(3, 71)], progress=False)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_modes_and_flags_are_kept() -> None:
    model = mlp().train()
    model[0].eval()
    model[2].bias.requires_grad_(False)
    fv.quantize(model, rows(), progress=False)
    assert (model.training, model[0].training, model[2].training) == (True, False, True)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True]


def test_calibration_is_the_same_from_a_generator() -> None:
    one, two = mlp(), mlp()
    a = fv.quantize(one, rows(), progress=False)
    b = fv.quantize(two, (batch for batch in rows()), progress=False)
    assert all(torch.equal(t, b.losses[n]) for n, t in a.losses.items())
    assert torch.equal(one(rows()[0]), two(rows()[0]))


def test_twice_is_an_error() -> None:
    model = mlp()
    fv.quantize(model, rows(), skip=["0"], progress=False)
    with pytest.raises(WeightError, match="quantized already"):
        fv.quantize(model, rows(), progress=False)


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.calibrate.passes.stream._SAVE_EVERY", 2)
    file = tmp_path / "new" / "statistics"
    batches = rows(70, 70, 7)

    def interrupted() -> Iterator[Tensor]:
        yield from batches[:5]
        raise KeyboardInterrupt

    expected = fv.quantize(mlp(), batches, progress=False)
    model = mlp()
    with pytest.raises(KeyboardInterrupt):
        fv.quantize(model, interrupted(), resume=file, progress=False)
    assert os.listdir(file.parent) == ["statistics"]
    seen = []

    def watch(module: nn.Module, args: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            seen.append(args[0])

    handle = model.register_forward_pre_hook(watch)
    profile = fv.quantize(model, batches, resume=file, progress=False)
    handle.remove()
    # one more for finding out the objective
    assert len(seen) == 1 + 3
    assert profile.samples == 70
    assert all(torch.equal(t, expected.losses[n]) for n, t in profile.losses.items())
    assert profile.measured_over_summed == pytest.approx(expected.measured_over_summed)
    assert not file.exists()


def test_a_damaged_resume_file(tmp_path: Path) -> None:
    file = tmp_path / "statistics"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"cannot be read .* delete it to start afresh"):
        fv.quantize(mlp(), rows(), resume=file, progress=False)


def test_a_loss_of_ones_own() -> None:
    model = mlp()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output[:, 0].sum()

    profile = fv.quantize(model, rows(), loss=loss, progress=False)
    assert profile.objective == "custom over embedding"
    # rows of the last layer that the loss does not see cost nothing
    assert float(profile.losses["4:weight"].sum()) > 0
    fv.quantize(mlp(), rows(), loss=lambda o, b: o.sum(), objective=fv.Logits(), progress=False)


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, 32), (32, 32), (33, 64), (64, 64), (100, 128), (128, 128), (4096, 128), (160, 32)]
)
def test_groups_are_chosen_by_bytes(columns: int, expected: int) -> None:
    def size(group: int) -> float:
        return -(-columns // group) * (group * 4 + 16)

    assert group_for(columns) in (32, 64, 128)
    assert size(group_for(columns)) == min(map(size, (32, 64, 128)))
    assert group_for(columns) == expected


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_group_can_be_asked_for(group: int) -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), group=group, progress=False)
    assert {s.group for s in profile.weight_sites()} == {group}
    with pytest.raises(FoveateError, match=r"group \(=48\)"):
        fv.quantize(mlp(), rows(), group=48, progress=False)


def test_padding_rows_of_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(20, 32, padding_idx=0), nn.Linear(32, 5))
    fv.quantize(model, [torch.randint(0, 20, (4, 6))], objective=fv.Logits(), progress=False)
    assert isinstance(model[0], PlaneEmbedding)
    assert model[0].padding_idx == 0
    # a row of zeros is constant: exact at every level
    assert float(model[0](torch.tensor([0])).detach().abs().max()) == 0
