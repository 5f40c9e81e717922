from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import foveate as fv

PUBLIC = sorted(name for name in vars(fv) if not name.startswith("_") and not inspect.ismodule(getattr(fv, name)))
PROMISED = {
    "ActivationOptions", "ActivationStore", "AdaptOptions", "Audit", "Budget", "BudgetError", "CacheProfile", "Cascade",
    "CheckpointError",
    "CompressActivations", "Constraints", "DataError", "DeviceError", "Embedding", "Floor", "FloorError",
    "FoveateError", "Frontier", "Fused", "Granularity", "Head", "ImportanceTracker", "KeepExact", "LevelError",
    "LevelState", "Limits",
    "Logits", "LostProcessError",
    "MemoryPlan", "MemoryReport", "MissingExtraError", "Objective", "Outcome", "Perturbation",
    "PlaneNotResidentError", "Point", "PrecisionMap", "Profile", "Relative", "Request", "RuntimeManager",
    "SavedReport", "Site", "SiteError", "Smoothed", "StateError", "TaskProfile", "TileTags", "Timings",
    "TrackingOptions", "Verification", "WeightError", "adapt_to_input", "allocate", "apply", "audit", "backends",
    "calibrate_cache", "cascade", "compact", "compress_activations",
    "current_map", "decoding_loop", "dequantize", "explain",
    "fit_to_loss",
    "floor", "fold_batchnorm", "frontier", "frontier_of", "fuse", "importance_of", "load", "load_frontier",
    "load_profile",
    "load_task", "measure", "measure_frontier", "measure_timings", "memory_report", "plan_memory", "profile_of",
    "quantize", "quantized_cache", "read_head", "register_with_transformers",
    "resize", "row_precision", "save", "save_frontier", "save_map",
    "save_task", "save_timings", "set_index", "smooth", "state_of", "track_importance", "unfuse", "uniform_of_bytes",
    "use_static_scales", "variance_proxy", "verify", "watch_inputs", "withdraw",
}  # fmt: skip


def test_what_is_promised_is_there_and_nothing_else() -> None:
    assert set(PUBLIC) == PROMISED


def test_the_head_imports_by_explicit_reexport() -> None:
    tree = ast.parse(Path(fv.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name == alias.asname for alias in node.names)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(fv, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        # dataclasses write a signature where there is no docstring
        assert not (value.__doc__ or "").startswith(f"{name}(")
        for method, member in vars(value).items():
            if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{method}"


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.endswith("Error")])
def test_errors_are_one_tree(name: str) -> None:
    error = getattr(fv, name)
    assert issubclass(error, fv.FoveateError)
    builtin = [
        base
        for base in error.__mro__
        if base.__module__ == "builtins" and base not in (object, BaseException, Exception)
    ]
    assert builtin or error is fv.FoveateError
    # the message is the message, also of those that are KeyErrors
    assert str(error("level (=5)")) == "level (=5)"


def _without(blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import importlib.abc, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {blocked!r}.split():
                    raise ModuleNotFoundError(name + " is blocked")

        sys.meta_path.insert(0, Blocked())
        {code}
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)


def test_importing_needs_none_of_the_extras_and_builds_nothing() -> None:
    code = (
        "import foveate, sys; print(foveate.__version__, [m for m in sys.modules if m == 'torch.utils.cpp_extension'])"
    )
    blocked = "transformers rich numpy scipy typer huggingface_hub hypothesis pytest"
    done = _without(blocked, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{fv.__version__} []"


def test_a_whole_run_needs_none_of_the_extras() -> None:
    code = """
        import tempfile, torch, foveate as fv
        model = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
        profile = fv.quantize(model, [torch.randn(8, 40)])
        fv.apply(model, fv.allocate(profile, fv.Budget(bits=12)))
        with tempfile.TemporaryDirectory() as folder:
            fv.save(model, folder)
            with torch.device("meta"):
                skeleton = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
            fv.load(folder, keep=4, model=skeleton)
    """
    done = _without("transformers rich scipy typer huggingface_hub", code.strip())
    assert done.returncode == 0, done.stderr


def test_rebuilding_a_transformers_model_without_transformers_says_what_to_install(tmp_path: Path) -> None:
    from tiny import quantized_llama

    fv.save(quantized_llama()[0], tmp_path / "llama")
    code = f"""
        import foveate as fv
        try:
            fv.load({str(tmp_path / "llama")!r})
        except fv.MissingExtraError as error:
            print(error)
    """
    done = _without("transformers", code.strip())
    assert "pip install" in done.stdout, done.stderr
