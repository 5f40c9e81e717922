"""Folders of foveate through transformers' own `from_pretrained`, and so through all that is built on it.

    fv.register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained("out/")

transformers asks a quantizer of the name that `config.json` has what to do before and after it loads weights. Ours
(`foveate.pretrained.quantizer`) lets transformers build the model and lets foveate load it.
"""

from __future__ import annotations

from foveate.errors import MissingExtraError


def register_with_transformers() -> None:
    """Let `from_pretrained` of transformers load folders that `foveate.save` wrote.

    One call a process, before the first such folder is loaded; further calls do nothing. Pipelines, evaluation
    harnesses and whatever else calls `from_pretrained` then get the model that `foveate.load` returns: on planes, with
    the folder's default map in force. A name of the hub works as a folder does: files of foveate are fetched with it.
    Other models are loaded as before.

    Raises:
        MissingExtraError: transformers is not installed.

    Example:
        >>> fv.register_with_transformers()
        >>> model = transformers.AutoModelForCausalLM.from_pretrained("out/")
    """
    try:
        from foveate.pretrained.quantizer import register
    except ImportError as error:
        raise MissingExtraError('from_pretrained is of transformers: pip install "foveate[cli]"') from error
    register()
