"""Heads of checkpoints with valid checksums and senseless contents: reading one gives an error of ours or a head.

PYTHONPATH=tests python tests/fuzz/heads.py [heads to read] [heads to load] [seed]
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hostile import Watch, ended, mutated, no_network, odd_value

import foveate as fv
from foveate.checkpoint.head import head_checksum
from tiny import quantized_llama, quantized_mlp

_CLASSES = (
    "UperNetForSemanticSegmentation",
    "DPTForDepthEstimation",
    "DetrForObjectDetection",
    "BertForSequenceClassification",
    "ResNetForImageClassification",
    "GPT2LMHeadModel",
    "DistilBertModel",
    "MixtralForCausalLM",
    "LlamaForSequenceClassification",
    "PreTrainedModel",
    "TimmBackbone",
    "T5ForConditionalGeneration",
)
_KEYS: dict[str, tuple[Any, ...]] = {
    "backbone": ("resnet50", "facebook/dinov2-base", "/etc", None),
    "backbone_config": (None, {}, {"model_type": "resnet"}, {"model_type": "timm_backbone", "backbone": "resnet18"}),
    "use_pretrained_backbone": (True,),
    "use_timm_backbone": (True, False),
    "num_labels": (10**8, -1, 10**400),
    "id2label": ({}, None, {"0": "a"}, [1]),
    "num_hidden_layers": (10**6, 10**9, -1, 3),
    "n_layers": (10**6,),
    "n_layer": (10**6,),
    "vocab_size": (10**9, 0, -5, 10**15),
    "max_position_embeddings": (10**9, 0, -1),
    "hidden_size": (10**9, 0, 31),
    "num_attention_heads": (10**9, 0),
    "intermediate_size": (10**12, 10**18, 0),
    "dtype": ("float16", "no_such", "int8", 5),
    "auto_map": ({"AutoConfig": "x/y--z.Z"},),
    "quantization_config": ({"quant_method": "bitsandbytes"}, {"quant_method": "gptq"}),
    "_attn_implementation": ("kernels-community/x", "flash_attention_2"),
    "layer_types": ([], ["x"] * 10, None),
    "tie_word_embeddings": (True, False),
    "_name_or_path": ("x/y",),
}


def bases(folder: Path) -> list[Path]:
    """Two folders whose heads are changed."""
    made = []
    for name, (model, _) in (("mlp", quantized_mlp()), ("llama", quantized_llama())):
        fv.save(model, folder / name)
        made.append(folder / name)
    return made


def _of_models(data: Any, choice: random.Random) -> Any:
    """Change what a model is rebuilt from."""
    about = data["model"]
    what = choice.randrange(4)
    if what == 0 or "config" not in about:
        return {**data, "model": mutated(about, choice)}
    config = dict(about["config"])
    for _ in range(choice.randint(1, 3)):
        key = choice.choice([*_KEYS, *config]) if what == 1 else choice.choice(list(_KEYS))
        config[key] = choice.choice(_KEYS[key]) if key in _KEYS else odd_value(choice)
    name = choice.choice(_CLASSES) if what == 3 else about["transformers"]
    if what == 3 and choice.random() < 0.5:
        config = {key: config[key] for key in _KEYS if key in config and choice.random() < 0.7}
    return {**data, "model": {**about, "config": config, "transformers": name}}


def fuzz(read: int, load: int, seed: int = 0) -> dict[str, Watch]:
    """Read and load so many heads."""
    watches = {"heads read": Watch(), "heads loaded": Watch()}
    choice = random.Random(seed)
    with tempfile.TemporaryDirectory() as place, no_network(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of configurations that it takes all the same
        folders = bases(Path(place))
        texts = [json.loads((folder / "foveate.json").read_bytes()) for folder in folders]
        for number in range(read + load):
            if number % 1000 == 999:
                print(f"{number + 1:,}: {', '.join(map(str, watches.values()))}", file=sys.stderr, flush=True)
            which = number % len(folders) if number < read else choice.choice([0, 1, 1, 1])
            folder, data = folders[which], texts[which]
            if number < read or which == 0 or choice.random() < 0.4:
                data = mutated(data, choice)
            else:
                data = _of_models(data, choice)
            data["sha256"] = head_checksum(data)
            text = json.dumps(data)
            (folder / "foveate.json").write_text(text)
            what = f"seed {seed}, number {number}: {text[-1500:]}"
            if number < read:
                watches["heads read"].see(lambda f=folder: fv.read_head(f), what)  # type: ignore[misc]
            else:
                skeleton = None if which else _skeleton()
                watches["heads loaded"].see(lambda f=folder, m=skeleton: fv.load(f, model=m), what)  # type: ignore[misc]
    return watches


def _skeleton() -> Any:
    import torch

    from tiny import mlp

    with torch.device("meta"):
        return mlp()


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(ended(fuzz(*given, *(100_000, 2_000)[len(given) :])))
