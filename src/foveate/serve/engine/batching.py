"""What transformers' continuous batching is extended by: a scheduler, a runner, and a manager with a hook in each step.

`RowScheduler` keeps the different precisions of one step within what a generation of levels can hold. `RowRunner` lets
each row choose its token by its own sampler. `StepManager` calls back before and after each step, on the thread that
runs the model, and once in each turn of its loop. Nothing else of transformers' engine is touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from foveate.kernels.planes.generations import MAX_MAPS
from foveate.serve.options import ServerLimits

#: Tokens of a page of the cache of keys and values.
PAGE = 16
_SCHEDULER = "foveate"


class Steps(Protocol):
    """What is called by the engine, on the thread that runs the model."""

    def class_of(self, request_id: str) -> Hashable:
        """What the precision of a request is told apart by; None follows the index in force."""

    def maps_of(self, request_id: str | None) -> int:
        """How many maps a step needs for the rows of a request; None: for those that ask for nothing."""

    def turn(self) -> None:
        """Between two steps, and some ten times a second where there is nothing to do."""

    def begin(self, batch: Sequence[Any], tokens: int) -> bool:
        """Before a step: its requests (FutureRequestState), and how many tokens; whether rows differ in precision."""

    def choose(self, batch: Sequence[Any], logits_NV: Tensor) -> list[int]:
        """The next token of each request that gets one in this step, by its logits."""

    def end(self, batch: Sequence[Any]) -> None:
        """After a step; not called if it failed."""


class RowScheduler(FIFOScheduler):
    """First come, first served, with as many wishes for precision in a step as a generation has maps for.

    Those that have waited longest for their turn go first, so none waits for ever.
    """

    steps: Steps | None = None
    _waited: list[Hashable]

    def _process_candidates(self, candidates: list[Any], *args: Any, **kwargs: Any) -> Any:
        assert self.steps is not None
        wishes = {state.request_id: self.steps.class_of(state.request_id) for state in candidates}
        different = dict.fromkeys(wish for wish in wishes.values() if wish is not None)
        needs = {wishes[state.request_id]: self.steps.maps_of(state.request_id) for state in candidates}
        room = MAX_MAPS - self.steps.maps_of(None)
        if sum(needs[wish] for wish in different) > room:
            order = [wish for wish in self._waited if wish in different]
            order += [wish for wish in different if wish not in self._waited]
            ends = itertools.accumulate(needs[wish] for wish in order)
            now = [wish for wish, end in zip(order, ends, strict=True) if end <= room]
            self._waited = [wish for wish in order if wish not in now] + now
            candidates = [s for s in candidates if wishes[s.request_id] is None or wishes[s.request_id] in now]
        return super()._process_candidates(candidates, *args, **kwargs)

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self._waited = []


class RowRunner(ModelRunner):
    """Runs the model, and chooses each row's token by the sampler of its request."""

    steps: Steps
    rows_differ = False

    def supports_logits_to_keep(self, model: Any) -> bool:
        """Whether the model computes logits of the last tokens alone.

        Where rows differ in precision, a layer must know whose rows it has, and that is known for all tokens only.
        """
        return not self.rows_differ and bool(super().supports_logits_to_keep(model))

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        chosen = self.steps.choose(self.inputs_and_outputs.requests_in_batch, scores[0])
        output_ids[0, : len(chosen)].copy_(torch.tensor(chosen, dtype=output_ids.dtype))


class StepManager(ContinuousBatchingManager):
    """Continuous batching of one model, with calls before and after each step.

    Args:
        model: a transformers model that predicts the next token.
        limits: sizes of the batch and of the cache.
        steps: what is called.
    """

    def __init__(self, model: Any, limits: ServerLimits, steps: Steps) -> None:
        self._steps = steps
        SCHEDULER_MAPPING.setdefault(_SCHEDULER, RowScheduler)
        super().__init__(
            model=model,
            generation_config=_greedy(model),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=-(-limits.cache_tokens // PAGE),
                max_batch_tokens=limits.batch_tokens,
                max_requests_per_batch=limits.batch,
                max_blocks_per_request=0,
                # blocks are found by their tokens alone, and a cache made at 2 bits must not answer for one of 8
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
                scheduler_type=_SCHEDULER,
            ),
        )

    def _create_batch_processor(self) -> Any:
        made = super()._create_batch_processor()
        made.scheduler.steps = self._steps
        runner = RowRunner(
            logit_processor=made.logit_processor,
            cb_config=made.cb_config,
            inputs_and_outputs=made.inputs_and_outputs,
            cache=made.cache,
            do_sample=False,
            return_logprobs=False,
        )
        runner.steps = self._steps
        made.model_runner = runner
        return made

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        self._steps.turn()
        return bool(super()._generation_loop_body(batch_processor, bootstrapping))

    def _generation_step(self) -> None:
        processor = self.batch_processor
        assert processor is not None
        batch = processor.inputs_and_outputs.requests_in_batch
        processor.model_runner.rows_differ = self._steps.begin(batch, sum(one.query_length for one in batch))
        super()._generation_step()
        self._steps.end(batch)

    def occupied(self) -> float:
        """The share of the cache of keys and values that is in use, 0 to 1."""
        processor = self.batch_processor
        return 0.0 if processor is None else 1.0 - float(processor.cache.compute_free_capacity())


def _greedy(model: Any) -> Any:
    """A configuration without any processor of logits: rows have samplers of their own."""
    end = getattr(model.generation_config, "eos_token_id", None)
    if end is None:
        end = getattr(model.config, "eos_token_id", None)
    return cast(Any, GenerationConfig)(do_sample=False, eos_token_id=-1 if end is None else end, use_cache=False)
