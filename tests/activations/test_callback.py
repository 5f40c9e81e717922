"""The Trainer's callback: in steps and nowhere else, whatever happens in them, and in the logs.

Where accelerate is not installed there is no Trainer; its own handler then calls the callback in a loop like its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

import foveate as fv


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 64, (4, 32), generator=generator) for _ in range(count)]
    return [{"input_ids": t, "labels": t} for t in tokens]


def packs() -> bool:
    """Whether anything that autograd saves is seen by a hook, or any torch function by a mode."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None or torch._C._len_torch_function_stack() > 0


class Training:
    """The order in which `Trainer._run_epoch` calls its callbacks."""

    def __init__(self, model: nn.Module, *callbacks: TrainerCallback, parts: int = 2) -> None:
        self.model, self.parts = model, parts
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.log_history = []
        self.handler = CallbackHandler(list(callbacks), model, None, self.optimizer, None)
        self.within: list[tuple[str, bool]] = []

    def call(self, event: str, *more: Any) -> None:
        getattr(self.handler, event)(None, self.state, self.control, *more)

    def train(self, data: list[dict[str, Tensor]], fail: Callable[[int], None] = lambda _: None) -> None:
        self.call("on_train_begin")
        self.call("on_epoch_begin")
        for i, batch in enumerate(data):
            if i % self.parts == 0:
                self.call("on_step_begin")
            fail(i)
            loss = self.model(**batch).loss / self.parts
            self.within.append(("loss", packs()))
            loss.backward()
            if (i + 1) % self.parts:
                self.call("on_substep_end")
                continue
            self.call("on_pre_optimizer_step")
            self.within.append(("optimizer", packs()))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.call("on_step_end")
            self.log({"loss": float(loss.detach())})
            with torch.no_grad():
                self.within.append(("evaluation", packs()))
                self.log({"eval_loss": float(self.model(**batch).loss)})
        self.call("on_train_end")

    def log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    assert not packs()
    yield
    assert not packs()


def test_it_is_a_callback_of_the_trainer() -> None:
    callback = fv.CompressActivations(error=0.1)
    assert isinstance(callback, TrainerCallback)
    assert isinstance(callback, fv.CompressActivations)
    assert type(callback).__name__ == "CompressActivations"

    class Mine(fv.CompressActivations):
        pass

    assert isinstance(Mine(levels=4), TrainerCallback)


def test_it_passes_the_options_on() -> None:
    options = fv.ActivationOptions(smallest=1, seed=3)
    callback = fv.CompressActivations(levels=32, options=options)
    Training(tiny(), callback).train(batches(1))
    assert callback.store is not None
    assert callback.store.settings.options == options


def test_it_is_in_the_forward_and_backward_of_every_part_and_nowhere_else() -> None:
    callback = fv.CompressActivations(error=0.1)
    training = Training(tiny(), callback)
    training.train(batches(8))
    assert {(what, within) for what, within in training.within} == {
        ("loss", True),
        ("optimizer", False),
        ("evaluation", False),
    }
    assert callback.store is not None
    assert callback.store.steps == 8
    assert callback.report().ratio > 3


def test_levels_of_32_train_as_without() -> None:
    plain, kept = tiny(), tiny()
    Training(plain).train(batches(4))
    Training(kept, fv.CompressActivations(levels=32)).train(batches(4))
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logs_of_the_loss_say_what_is_kept() -> None:
    callback = fv.CompressActivations(error=0.1)
    training = Training(tiny(), callback, parts=1)
    training.train(batches(5))
    losses = [entry for entry in training.state.log_history if "loss" in entry]
    others = [entry for entry in training.state.log_history if "loss" not in entry]
    assert len(losses) == len(others) == 5
    assert not any("saved_ratio" in entry for entry in others)
    report = callback.report()
    assert losses[-1]["saved_ratio"] == pytest.approx(report.ratio, rel=1e-4)
    assert losses[-1]["saved_error"] == pytest.approx(report.predicted, abs=1e-6)
    assert losses[-1]["saved_error_audited"] == pytest.approx(report.audits[-1].audited, abs=1e-6)
    assert "saved_error_audited" not in losses[0]


def test_a_forward_that_fails_leaves_the_store_at_once() -> None:
    model = tiny()
    callback = fv.CompressActivations(error=0.1)
    training = Training(model, callback)
    wrong = [*batches(3), {"input_ids": torch.full((4, 32), 99), "labels": torch.zeros(4, 32, dtype=torch.long)}]
    with pytest.raises(IndexError):
        training.train(wrong)
    assert not packs()
    training.train(batches(4))
    assert callback.store is not None
    assert callback.store.steps == 3 + 4


def test_what_else_fails_leaves_it_when_training_begins_again() -> None:
    class StopError(Exception):
        pass

    def fail(i: int) -> None:
        if i == 3:
            raise StopError

    callback = fv.CompressActivations(error=0.1)
    training = Training(tiny(), callback)
    with callback, pytest.raises(StopError):
        training.train(batches(4), fail)
    assert not packs()
    with pytest.raises(StopError):
        training.train(batches(4), fail)
    assert packs()
    training.train(batches(4))
    assert not packs()
    with pytest.raises(StopError):
        training.train(batches(4), fail)
    callback.leave()
    callback.leave()


def test_training_again_goes_on_with_what_was_learned_and_another_model_does_not() -> None:
    callback = fv.CompressActivations(error=0.1)
    model = tiny()
    hooks = len(model._forward_hooks)
    Training(model, callback).train(batches(4))
    first = callback.store
    Training(model, callback).train(batches(2))
    assert callback.store is first
    assert len(model._forward_hooks) == hooks
    Training(tiny(), callback).train(batches(2))
    assert callback.store is not first


def test_a_compiled_model_is_warned_of() -> None:
    model = tiny()
    callback = fv.CompressActivations(levels=4)
    training = Training(model, callback)
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="what compiled functions keep"):
        training.train(batches(2))
    assert callback.report().bytes_compiled > 0
    torch._dynamo.reset()


def test_settings_and_order_that_make_no_sense_are_refused() -> None:
    with pytest.raises(fv.BudgetError, match=r"error \(=-1.0\)"):
        Training(tiny(), fv.CompressActivations(error=-1.0)).train(batches(2))
    with pytest.raises(fv.DataError, match="nothing was trained"):
        fv.CompressActivations(error=0.1).report()


def test_without_transformers_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import foveate as fv
try:
    fv.CompressActivations(error=0.1)
except fv.MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install" in done.stdout, done.stderr


def test_the_trainer_itself(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{name: value[0] for name, value in batch.items()} for batch in batches(32)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = fv.CompressActivations(error=0.1)
    trainer = Trainer(tiny(), arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[callback])
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(entry["saved_ratio"] > 2 for entry in losses)
    assert callback.store is not None
    assert callback.store.steps == 12
