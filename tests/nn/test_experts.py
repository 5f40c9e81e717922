"""Mixtures of experts: stacks taken apart, each expert a weight of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import WeightError
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.nn.experts import PlaneExperts, taken_apart
from foveate.nn.modules import PlaneLinear
from foveate.nn.registry import registry_of
from tiny import TRANSFORMER, generator, tokens

transformers = pytest.importorskip("transformers")


def _model(kind: str, **changes: Any) -> Any:
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Llama4' else ''}Config")(**{**TRANSFORMER, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    g = generator(1)
    for name, p in model.named_parameters():
        if p.dim() == 3 or (name.endswith("bias") and p.dim() == 2):
            nn.init.normal_(p, std=0.2, generator=g)
        elif "gate.weight" in name or "router" in name:
            # routers that are sure, so that rounding does not send a token elsewhere
            nn.init.normal_(p, std=2.0, generator=g)
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: _model("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen3 MoE": lambda: _model("Qwen3Moe", moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=8),
    "gpt-oss: [E, in, out] with biases": lambda: _model(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, rope_parameters={"rope_type": "default"}
    ),
    "Llama 4: every expert its rows": lambda: _model(
        "Llama4", intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, head_dim=8
    ),
    "Nemotron: no gate": lambda: _model(
        "NemotronH",
        layers_block_type=["attention", "moe"],
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
    ),
}


def _stacks(model: nn.Module) -> dict[str, PlaneExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PlaneExperts)}


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_apart_changes_nothing_and_is_undone(family: str) -> None:
    model = FAMILIES[family]()
    kinds = [type(m) for m in model.modules()]
    parameters = list(model.parameters())
    batch = tokens()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        with taken_apart(model):
            assert _stacks(model)
            got = model(**batch).logits
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.equal(model(**batch).logits, expected)
    assert [type(m) for m in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def _layer_errors(model: nn.Module, original: nn.Module) -> list[float]:
    """How far each layer of experts is from the original, with the same tokens sent to the same experts."""
    errors = []

    def compare(stack: PlaneExperts) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], expected: Tensor) -> None:
            errors.append(float((stack(*args) - expected).norm() / expected.norm()))

        return hook

    handles = [original.get_submodule(n).register_forward_hook(compare(s)) for n, s in _stacks(model).items()]
    with torch.no_grad():
        original(**tokens(8, seed=4)[0])
    for handle in handles:
        handle.remove()
    assert len(errors) == len(handles) > 0
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_falls_with_bits_and_a_folder_gives_the_same_model(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, tokens(32, 16), progress=False)
    assert not any("layout" in note for note in profile.notes)
    stacks = _stacks(model)
    assert all(
        isinstance(m, PlaneLinear) for s in stacks.values() for e in range(4) for m in s._modules[str(e)].values()
    )
    held_out = tokens(seed=4)
    plans = [profile.uniform(level, 16) for level in (2, 3, 4, 6, 8)]
    found = [o.divergence for o in fv.measure(model, plans, held_out, reference=original, progress=False)[:-1]]
    assert found == sorted(found, reverse=True)
    # not to nothing: a token near the border between two experts goes to the other one at any rounding
    assert found[-1] < 0.1 * found[0]
    batch = held_out[0]
    # feedback at 4 bits leaves 8 bits some of its errors to mend: a tenth of the squared error, at most
    for level, most in ((4, 0.2), (8, 0.2 * 0.1**0.5)):
        fv.apply(model, profile.uniform(level, 16))
        assert max(_layer_errors(model, original)) < most

    plan = fv.allocate(profile, fv.Budget(bits=7.5))
    assert plan.predicted_loss <= profile.predict(fv.uniform_of_bytes(plan))
    fv.apply(model, plan)
    with torch.no_grad():
        expected = model(**batch).logits
        fv.save(model, tmp_path / "all")
        again = fv.load(tmp_path / "all")
        assert torch.equal(again(**batch).logits, expected)
        assert fv.current_map(again) == plan
        fv.save(model, tmp_path / "kept", keep=plan)
        assert torch.equal(fv.load(tmp_path / "kept")(**batch).logits, expected)
        fv.apply(again, profile.uniform(8, 16))
        fv.apply(model, profile.uniform(8, 16))
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert fv.load_profile(tmp_path / "all").notes == profile.notes


def test_only_the_experts_a_token_is_routed_to_are_multiplied() -> None:
    model = FAMILIES["Mixtral"]()
    fv.quantize(model, tokens(8, 16), progress=False)
    (stack, _) = _stacks(model).values()
    seen: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = len(args[0])

        return hook

    for name, module in stack.named_modules():
        if isinstance(module, PlaneLinear):
            module.register_forward_hook(watch(name))
    index = torch.tensor([[3, 1], [1, 3], [1, 4]])  # 4 is nobody
    x = torch.randn(3, 32)
    weights = torch.rand(3, 2)
    with torch.no_grad():
        y = stack(x, index, weights)
        assert seen == {"1.gate_up_proj": 3, "1.down_proj": 3, "3.gate_up_proj": 2, "3.down_proj": 2}
        # what a token gets does not depend on the others
        assert torch.equal(stack(x[1:2], index[1:2], weights[1:2]), y[1:2])
        assert stack(x[:0], index[:0], weights[:0]).shape == (0, 32)
        assert torch.equal(stack(x[:1], torch.full((1, 2), 4), weights[:1]), torch.zeros(1, 32))


def test_each_expert_has_sites_tiles_and_a_frequency_of_its_own() -> None:
    model = FAMILIES["Mixtral"]()
    profile = fv.quantize(model, tokens(8, 16), progress=False)
    sites = {s.name: s for s in profile.weight_sites() if ".experts." in s.name}
    assert len(sites) == 2 * 4 * 2
    up = "model.layers.1.mlp.experts.{}.gate_up_proj:weight"
    shares = [float(profile.statistics[up.format(i)]["routing_frequency"]) for i in range(4)]
    assert sum(shares) == pytest.approx(2)  # two experts a token
    for i, share in enumerate(shares):
        assert sites[up.format(i)].rows_read == round(share * 96)
    # as many bytes are read as the routed experts have, not all
    plan = profile.uniform(4)
    read = sum(plan.tile_bytes(s) * s.rows_read / s.rows for s in sites.values())
    assert read == pytest.approx(0.5 * sum(plan.tile_bytes(s) for s in sites.values()), rel=0.02)
    assert plan.with_level("*.experts.2.*:weight", 2).levels[up.format(2)] == 2
    mixed = fv.allocate(profile, fv.Budget(bits=7.0))
    assert len({levels for name in sites for levels in [mixed.levels[name]]}) > 1


def test_switching_moves_nothing() -> None:
    model = FAMILIES["Qwen3 MoE"]()
    profile = fv.quantize(model, tokens(8, 16), progress=False)
    weights = registry_of(model).weights
    where = [[t.data_ptr() for t in w.value.tensors] for w in weights.values()]
    batch = tokens(seed=3)[0]
    with torch.no_grad():
        fv.apply(model, profile.uniform(8))
        high = model(**batch).logits
        fv.apply(model, profile.uniform(2))
        assert not torch.allclose(model(**batch).logits, high)
        fv.apply(model, profile.uniform(8))
        assert torch.equal(model(**batch).logits, high)
    assert [[t.data_ptr() for t in w.value.tensors] for w in weights.values()] == where


def test_a_compiled_model_is_one_graph_and_switches_without_another() -> None:
    model = FAMILIES["Mixtral"]()
    profile = fv.quantize(model, tokens(8, 16), progress=False)
    fv.unfuse(model)  # compiled calls run layer by layer
    ids = tokens(seed=3)[0]["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for level in (8, 2, 4):
            fv.apply(model, profile.uniform(level))
            assert torch.equal(compiled(ids), model(input_ids=ids).logits)
    x, index, weights = torch.randn(5, 32), torch.randint(0, 5, (5, 2)), torch.rand(5, 2)
    number = _stacks(model)["model.layers.0.mlp.experts"]._number
    torch.library.opcheck(torch.ops.foveate.plane_experts.default, (x, index, weights, number))
    # a copy is called as itself, not as the one it was copied from
    other = copy.deepcopy(model)
    fv.apply(model, profile.uniform(2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: other(input_ids=x, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(ids), other(input_ids=ids).logits)
        assert not torch.equal(compiled(ids), model(input_ids=ids).logits)


def _without(gate: nn.Module, expert: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    plain = gate.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, index = plain(hidden)
        return logits, scores, torch.where(index == expert, 0, index)

    return forward


def test_an_expert_that_calibration_never_reached_is_named_and_not_worth_nothing() -> None:
    model = FAMILIES["Mixtral"]()
    gate = model.model.layers[1].mlp.gate
    gate.forward = _without(gate, 2)
    profile = fv.quantize(model, tokens(8, 16), progress=False)
    (note,) = [note for note in profile.notes if "fewer rows" not in note]
    assert all(bool(torch.isfinite(t).all()) for t in profile.losses.values())
    assert note.startswith("calibration never routed to expert 2 of model.layers.1.mlp.experts: rounded to nearest")
    name = "model.layers.1.mlp.experts.{}.{}_proj:weight"
    for part in ("gate_up", "down"):
        own = profile.losses[name.format(2, part)].sum(0)
        others = torch.stack([profile.losses[name.format(i, part)].sum(0) for i in (0, 1, 3)]).mean(0)
        four = WEIGHT_LEVELS.index(4)
        assert 0 < own[four] < 0.2 * others[four]
        assert float(profile.statistics[name.format(2, part)]["routing_frequency"]) == 0
    # more data make it cheaper still
    more = FAMILIES["Mixtral"]()
    more.model.layers[1].mlp.gate.forward = _without(more.model.layers[1].mlp.gate, 2)
    longer = fv.quantize(more, tokens(32, 16), progress=False)
    assert longer.losses[name.format(2, "down")].sum() < 0.5 * profile.losses[name.format(2, "down")].sum()
    # and it works all the same when it is met
    with torch.no_grad():
        stack = _stacks(model)["model.layers.1.mlp.experts"]
        y = stack(torch.randn(1, 32), torch.tensor([[2, 2]]), torch.tensor([[0.5, 0.5]]))
        assert torch.isfinite(y).all()
        assert y.abs().max() > 0


def test_skipping_all_experts_leaves_the_layer_and_skipping_one_leaves_that_one(tmp_path: Path) -> None:
    model = FAMILIES["Mixtral"]()
    batch = tokens(seed=3)[0]
    profile = fv.quantize(
        model, tokens(8, 16), skip=["model.layers.0.mlp.experts.*", "*layers.1.mlp.experts.3.*"], progress=False
    )
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert profile.notes == (
        "model.layers.1.mlp.experts.3.gate_up_proj was left as it is",
        "model.layers.1.mlp.experts.3.down_proj was left as it is",
        "model.layers.0.mlp.experts was left as it is",
        "50 % of the parameters stay float: Linear 49 %, MixtralTopKRouter 1 %",
    )
    stack = model.model.layers[1].mlp.experts
    left = stack._modules["3"]["down_proj"]
    assert type(left) is nn.Linear
    assert left.weight.untyped_storage().nbytes() == 4 * left.weight.numel()
    fv.save(model, tmp_path / "out")
    again = fv.load(tmp_path / "out")
    assert type(again.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


class _StrangeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.gate_up_proj)


def test_a_layout_that_is_not_known_is_left_and_said_so() -> None:
    model = nn.Sequential(nn.Linear(6, 8), _StrangeExperts(), nn.Linear(5, 4))
    profile = fv.quantize(model, [torch.randn(9, 6)], objective=fv.Logits(), progress=False)
    assert profile.notes[0] == "1 (_StrangeExperts) was left as it is: a layout of experts that is not known here"
    assert type(model[1]) is _StrangeExperts


def test_what_is_refused_leaves_the_experts_as_they_were() -> None:
    model = FAMILIES["Mixtral"]()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(WeightError, match=r"model.layers.1.mlp.experts.2.down_proj.weight holds NaN"):
        fv.quantize(model, tokens(), progress=False)
    assert [type(m) for m in model.modules()] == kinds


def test_bfloat16() -> None:
    model = FAMILIES["gpt-oss: [E, in, out] with biases"]().bfloat16()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, tokens(8, 16), progress=False)
    fv.apply(model, profile.uniform(8))
    assert max(_layer_errors(model, original)) < 0.2 / 8 * 2**0.5
    with torch.no_grad():
        assert model(**tokens(seed=3)[0]).logits.dtype == torch.bfloat16
