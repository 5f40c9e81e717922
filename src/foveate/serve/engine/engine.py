"""Engine: one model under continuous batching, whose rows are read at the precision that their requests ask for.

A step is: the deciders move (`PrecisionControl.turn`), transformers schedules, rows get their maps (`begin`), the model
runs, each row's sampler chooses (`choose`), and the answers' tokens go to the event loop (`end`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.nn.levels import set_row_classes
from foveate.precision.frontiers import Frontier
from foveate.serve.calls.fields import MOST_ECHOED, Call
from foveate.serve.calls.refused import RefusedRequest
from foveate.serve.engine.batching import StepManager
from foveate.serve.engine.control import PrecisionControl
from foveate.serve.engine.jobs import Ended, Job, Jobs
from foveate.serve.engine.metrics import Metrics
from foveate.serve.engine.plain_calls import prompt_logprobs
from foveate.serve.engine.sampling import Chosen, Sampler
from foveate.serve.options import ServeOptions

T = TypeVar("T")
_log = logging.getLogger("foveate")


class Engine:
    """Answers calls with one model.

    Args:
        model: a quantized transformers model that predicts the next token.
        tokenizer: its fast tokenizer.
        frontier: the chain of maps that precision moves along.
        options: how the server is run.

    Attributes:
        control: who decides precision.
        jobs: the requests on their way.
        metrics: what is counted.
        draining: whether no more requests are taken.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, frontier: Frontier, options: ServeOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.jobs = Jobs(options.limits)
        self.metrics = Metrics()
        self.control = PrecisionControl(
            model,
            frontier,
            bend=options.bend,
            options=options.manager,
            queue_wait=self.jobs.head_wait,
            adapt_on=options.adapt_on,
            follow=options.follow,
        )
        self.draining = False
        self.positions = getattr(model.config, "max_position_embeddings", None) or options.limits.cache_tokens
        self._ends = _ends_of(model)
        self._manager = StepManager(model, options.limits, self)
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._step_jobs: list[Job | None] = []
        self._step_began, self._forward = 0.0, 0.0
        self._before: float | None = None
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """Begin to compute."""
        self.control.start()
        self._manager.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be computed."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    @property
    def cache_usage(self) -> float:
        """The share of the cache of keys and values that is in use, 0 to 1."""
        return self._manager.occupied()

    def submit(self, call: Call, tokens: Sequence[int]) -> Job:
        """Take in a call; call it on the event loop.

        Args:
            call: what is asked for.
            tokens: the prompt.

        Raises:
            RefusedRequest: it cannot be served (400), not now (429), or not any more (503).
        """
        if self.draining or not self.alive:
            why = "ends" if self.draining else "cannot compute any more"
            raise RefusedRequest(f"the server {why}", status=503, headers={"Retry-After": "5"})
        most = self._most(call, len(tokens))
        job = Job(
            id=f"job-{next(self._numbers)}",
            call=call,
            tokens=tuple(tokens),
            max_tokens=most,
            request=call.wish.on(self.control.frontier, self.control.names),
            ends=frozenset() if call.ignore_eos else self._ends,
            sampler=Sampler(sampling=call.sampling),
            loop=asyncio.get_running_loop(),
        )
        self.jobs.admit(job, self.control.admits, self._put)
        return job

    def _most(self, call: Call, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many tokens."""
        limits = self.options.limits
        if call.echo and call.sampling.logprobs is not None and prompt > MOST_ECHOED:
            raise RefusedRequest(
                f"the prompt has {prompt} tokens: with log probabilities at most {MOST_ECHOED} are echoed",
                parameter="echo",
            )
        words = getattr(self.model.config, "vocab_size", None)
        room = min(int(self.positions), limits.cache_tokens) - prompt
        if prompt < 1 or room < 1:
            raise RefusedRequest(f"the prompt has {prompt} tokens, and 1 to {prompt + room - 1} are served")
        if isinstance(call.prompt, tuple) and words and any(type(t) is int and t >= words for t in call.prompt):
            raise RefusedRequest(f"prompt has a token beyond the vocabulary of {words}", parameter="prompt")
        if call.max_tokens is None:
            return min(limits.default_tokens, limits.answer_tokens, room)
        if call.max_tokens > limits.answer_tokens or call.max_tokens > room:
            raise RefusedRequest(
                f"max_tokens (={call.max_tokens}) is more than {min(limits.answer_tokens, room)}, what a prompt of "
                f"{prompt} tokens leaves",
                parameter="max_tokens",
            )
        return call.max_tokens

    def _put(self, job: Job) -> None:
        def finished(output: Any) -> None:
            self.jobs.remove(job)
            if output.error is not None:
                self.metrics.ended(job, "error")
                job.events.put_nowait(Ended(reason="error", error=str(output.error)))

        self._manager.register_result_handler(job.id, finished)
        taken = self._manager.add_request(
            list(job.tokens), request_id=job.id, max_new_tokens=job.max_tokens, eos_token_id=list(job.ends) or -1
        )
        if taken is None:
            raise RefusedRequest("the server ends", status=503, headers={"Retry-After": "5"})

    def cancel(self, job: Job) -> None:
        """End a job whose answer nobody waits for any more; call it on the event loop. Ended jobs stay so."""
        if self.jobs.get(job.id) is not job:
            return
        self.jobs.remove(job)
        self._manager.cancel_request(job.id)
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(job.id, None)

    def ask(self, change: Callable[[], T]) -> Future[T]:
        """Have a function run between two steps, on the thread that runs the model."""
        answer: Future[T] = Future()
        if not self.alive:
            answer.set_exception(FoveateError("the engine cannot compute any more"))
        else:
            self._asked.put((change, answer))
        return answer

    def ask_logprobs(self, job: Job) -> Future[list[Chosen]]:
        """Have the log probabilities of a prompt computed, between two steps, for which all other requests wait."""
        count = job.call.sampling.logprobs
        assert count is not None

        def computed() -> list[Chosen]:
            self.control.forget_rows()  # a generation holds only so many maps
            return prompt_logprobs(self.model, job.tokens, job.request, count)

        return self.ask(computed)

    def stop(self, seconds: float) -> None:
        """Let what is on its way end, for at most so many seconds, and then end it."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.jobs.all() and self.alive and time.monotonic() < until:
            time.sleep(0.02)
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=10.0, hard_stop=bool(self.jobs.all()))
        self.control.close()

    # what the engine's thread calls

    def maps_of(self, request_id: str | None) -> int:
        """How many maps a step needs for the rows of a request, or for those that ask for nothing."""
        job = None if request_id is None else self.jobs.get(request_id)
        return self.control.maps_of(None if job is None else job.request)

    def class_of(self, request_id: str) -> Hashable:
        """What the precision of a request is told apart by; None follows the index in force."""
        job = self.jobs.get(request_id)
        return None if job is None else job.request

    def turn(self) -> None:
        """Between two steps: the operator's changes, and the manager."""
        while True:
            try:
                change, answer = self._asked.get_nowait()
            except queue.Empty:
                break
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(change())
            except Exception as error:  # raised where the change was asked for
                answer.set_exception(error)
        self.control.turn()
        unread = self._manager.output_router.output_queue  # of requests that ended while they were cancelled
        while not unread.empty():
            unread.get_nowait()
        if self._manager.batch_processor is not None and not self.jobs.all():
            self._before = None  # time without work is no time between steps

    def begin(self, batch: Sequence[Any], tokens: int) -> bool:
        """Before a step: rows get their maps, and what each request gets is written down."""
        now = self._step_began = time.perf_counter()
        jobs = self._step_jobs = [self.jobs.get(one.state.request_id) for one in batch]
        requests = [None if job is None else job.request for job in jobs]
        indices, differ = self.control.pass_indices(requests, [one.query_length for one in batch])
        moment = time.monotonic()
        for job, index, one in zip(jobs, indices, batch, strict=True):
            if job is not None:
                if job.started is None:
                    job.started = moment
                    self.metrics.started(job, moment)
                job.given.add(index, self.control.read_bits(index), one.has_new_token)
        self._forward = now
        return differ

    def choose(self, batch: Sequence[Any], logits_NV: Tensor) -> list[int]:
        """The next token of each request that gets one in this step."""
        self._forward = time.perf_counter() - self._forward
        moment = time.monotonic()
        jobs = [job for job, one in zip(self._step_jobs, batch, strict=True) if one.has_new_token]
        chosen = []
        for job, logits_V in zip(jobs, logits_NV, strict=False):
            if job is None:  # it was cancelled while it was computed
                chosen.append(int(logits_V.argmax()))
                continue
            got = job.sampler.choose(logits_V)
            chosen.append(got.token)
            self._hand_over(job, got, moment)
        return chosen

    def _hand_over(self, job: Job, got: Chosen, moment: float) -> None:
        self.metrics.token(job, moment)
        job.first, job.latest = job.first or moment, moment
        job.answer.append(got.token)
        stops = got.token in job.ends
        if not stops:
            job.post(got)
        if stops or job.produced >= job.max_tokens:
            reason = "stop" if stops else "length"
            self.metrics.ended(job, reason, moment)
            job.post(Ended(reason=reason))
            self.control.deciders.answered((*job.tokens, *job.answer))

    def end(self, batch: Sequence[Any]) -> None:
        """After a step: what is counted."""
        set_row_classes(self.model, None)
        now = time.perf_counter()
        prompts = sum(one.query_length for one in batch if one.query_length > 1)
        if prompts:
            self.jobs.prefilled(prompts, now - self._step_began)
        whole = None if self._before is None else now - self._before
        self.metrics.step(len(batch), prompts, self._forward, whole)
        self._before = now


def _ends_of(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    for holder in (getattr(model, "generation_config", None), model.config):
        end = getattr(holder, "eos_token_id", None)
        if end is not None:
            return frozenset([end] if isinstance(end, int) else end)
    return frozenset()


def warm_up(engine: Engine) -> None:
    """Compute one token, so that the first request does not wait for what is made once."""
    with torch.no_grad():
        engine.model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False)
