"""The loop of transformers' `generate`, without what nobody asked for between two tokens.

`generate` prepares everything: the configuration, processors of logits, criteria to stop, the cache. What it does for
each token besides the model's pass takes up to a fifth of a small model's token: it prepares inputs that are known,
copies and compares tensors of one element, and updates arguments. It takes another loop as an argument:

    model.generate(ids, custom_generate=fv.decoding_loop, max_new_tokens=64)

This one gives the same tokens. Where more is asked for than it does (beams, returned scores, padding, several sequences
that end by themselves), it hands over to the loop of transformers. `generate` gives its streamer to no loop but its
own; `functools.partial(fv.decoding_loop, streamer=streamer)` has one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from foveate.nn.decoder.direct import DirectPass
from foveate.nn.foreign.cache_argument import cache_argument, cache_of

#: What `generate` hands its loop that this one needs not know, or knows.
_KNOWN = frozenset(
    ("attention_mask", "cache", "past_key_values", "use_cache", "position_ids", "cache_position", "logits_to_keep")
)
#: What a configuration asks for that this loop does not do.
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")


def decoding_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode token by token, greedily or by sampling; `generate` calls it with what it prepared.

        ids = model.generate(**inputs, custom_generate=fv.decoding_loop, max_new_tokens=64)

    Args:
        model: a model of transformers.
        input_ids: int64 [B, S], the prompts.
        logits_processor, stopping_criteria, generation_config, synced_gpus, streamer: of transformers.
        model_kwargs: what the model's first pass is given besides.

    Returns:
        The prompts and the tokens after them, int64 [B, S + new].
    """
    ends = _ends(stopping_criteria)
    if not _does(model, input_ids, generation_config, synced_gpus, model_kwargs, ends):
        other = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample
        return other(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    output = model._prefill(input_ids, generation_config, model_kwargs)
    cache, last = cache_of(output), stopping_criteria.max_length
    argument = cache_argument(model, cache)
    direct = DirectPass.of(model)
    logits_BV = output.logits[:, -1]
    del output
    while True:
        # processors may change them in place, and a prompt's logits are large
        logits_BV = logits_BV.to(torch.float32, copy=True)
        scores_BV = logits_processor(input_ids, logits_BV)
        if generation_config.do_sample:
            token_B1 = torch.multinomial(scores_BV.softmax(-1), num_samples=1)
        else:
            token_B1 = scores_BV.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token_B1], -1)
        if streamer is not None:
            streamer.put(token_B1[:, 0])
        if ends is None:
            over = bool(stopping_criteria(input_ids, None).all())
        else:
            over = input_ids.shape[1] >= last or (bool(ends) and int(token_B1) in ends)
        if over:
            break
        found = None if direct is None else direct(token_B1, cache)
        if found is None:
            found = model(input_ids=token_B1, **argument, use_cache=True, return_dict=True).logits[:, -1]
            if direct is not None and not direct.is_as(found):
                direct = None
        logits_BV = found
    if streamer is not None:
        streamer.end()
    return input_ids


def _does(
    model: Any, input_ids: Tensor, config: Any, synced_gpus: bool, given: dict[str, Any], ends: frozenset[int] | None
) -> bool:
    """Whether this loop does all that a call asks for."""
    mask, cache = given.get("attention_mask"), given.get("cache", given.get("past_key_values"))
    return not (
        synced_gpus
        or "is_first_iteration" not in inspect.signature(getattr(model, "_prefill", len)).parameters  # older releases
        or (config.num_beams or 1) > 1
        or model.config.is_encoder_decoder
        or getattr(config, "is_assistant", False)
        or getattr(config, "prefill_chunk_size", None) is not None
        or any(getattr(config, name, False) for name in _OUTPUTS)
        or not given.get("use_cache")
        or cache is None
        or getattr(cache, "is_compileable", False)  # its pass may be compiled
        or {name for name, value in given.items() if value is not None} - _KNOWN
        or (mask is not None and not (mask.dim() == 2 and bool((mask == 1).all())))
        or (input_ids.shape[0] > 1 and ends != frozenset())
    )


def _ends(criteria: Any) -> frozenset[int] | None:
    """The tokens that end a sequence; None where there are criteria besides these and the length."""
    found: set[int] = set()
    for one in criteria:
        kind = type(one).__name__
        if kind == "EosTokenCriteria":
            found.update(one.eos_token_id.tolist())
        elif kind != "MaxLengthCriteria":
            return None
    return frozenset(found)
