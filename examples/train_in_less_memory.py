"""Train a small language model and keep what autograd saves for backward in few bits.

    python examples/train_in_less_memory.py --steps 200

The model is a byte-level Llama with random weights and the text is Python's own standard library, so nothing is
downloaded. `fv.compress_activations` states a bound on the error of every parameter's gradient; while the model trains
it measures the true error now and then (it audits), and its report shows both beside the bytes of every site.

Shapes: B windows a step, S bytes a window.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foveate as fv


def text(most: int = 4 << 20) -> Tensor:
    """Python source from the standard library, as bytes: uint8 [n], at most `most` of them."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)[:most]), dtype=torch.uint8)


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama that reads bytes, with random weights, in training mode."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        use_cache=False,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train()
    return model


def train(
    steps: int, error: float, width: int = 128, layers: int = 4, batch: int = 8, length: int = 256
) -> list[float]:
    """Train, and print losses on the way and the store's report at the end; returns the loss of every step, in nats."""
    torch.manual_seed(0)
    source, model = text(), llama(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with fv.compress_activations(model, error=error) as store:
        for step in range(steps):
            starts = torch.randint(0, len(source) - length, (batch, 1))
            bytes_BS = source[starts + torch.arange(length)].long()
            loss = model(input_ids=bytes_BS, labels=bytes_BS).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % 20 == 0:
                print(f"step {step}: loss {losses[-1]:.3f} nats per byte")
    print(store.report())
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--error", type=float, default=0.3, help="bound on the relative error of every gradient")
    given = parser.parse_args(arguments)
    train(given.steps, given.error)


if __name__ == "__main__":
    main()
