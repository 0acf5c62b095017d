"""A Python model file: build(), samples(), and optionally the other HOOKS."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from deploytool.errors import DeployError, EnvironmentLacking, InputRefused, nearest
from deploytool.load.flat import FlatModule, as_tensor
from deploytool.load.infer import Seen, infer_signature, refuse_non_finite
from deploytool.load.track import tracking
from deploytool.source import ModelRef, Source

HOOKS = ("build", "samples", "INPUTS", "evaluate", "LOWER_IS_BETTER", "calibration", "train_batches", "loss", "prompts",
         "FILES", "assets")  # fmt: skip
_NOTHING = object()
_KINDS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("evaluate", "calibration", "train_batches", "loss", "prompts", "assets"), Callable, "a function"),
    (("LOWER_IS_BETTER", "FILES"), (list, tuple, set, frozenset), "a list or tuple"),
    (("INPUTS",), Mapping, "a dict of shapes"),
)


@dataclass(frozen=True)
class ModelFile:
    """A model file that was executed."""

    ref: ModelRef
    code: ModuleType

    def hook(self, name: str) -> Any:
        """The module's attribute, or None."""
        return getattr(self.code, name, None)

    def call(self, name: str) -> Any:
        """Run one of the file's functions; what it raises becomes an error that names the file."""
        return self._guarded(name, self.code.__dict__[name])

    def _guarded(self, name: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except DeployError:
            raise
        except ImportError as error:
            raise _missing(self.ref, error) from error
        except Exception as error:
            raise _failed(self.ref, f"{name}()", error) from error

    def samples(self) -> list[dict[str, Tensor]]:
        """All samples as tensors; a generator is run to its end."""
        found = self._guarded("samples", self._drawn)
        return [_sample(self.ref, index, s) for index, s in enumerate(found)]

    def _drawn(self) -> list[Any]:
        """What samples() gives; raises InputRefused for an iterator that a later call finds used up."""
        give = self.code.__dict__["samples"]
        given = give()
        found = list(given)
        if isinstance(given, Iterator) and (not found or next(iter(give()), _NOTHING) is _NOTHING):
            raise InputRefused("DT303", "samples() must give all samples anew at every call (got an iterator that is "
                               f"used up, {len(found)} samples at the first call and none after that)",
                               fix="return a list, or make the iterator inside of samples()")  # fmt: skip
        return found


def read_model_file(ref: ModelRef) -> ModelFile:
    """Execute a model file; raises InputRefused when it cannot be, or has no build() or samples()."""
    path = Path(ref.path)
    name = f"deploytool_model_{path.stem}_{hashlib.sha256(ref.path.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputRefused("DT302", f"{path} must be a Python file")
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code  # before execution, or dataclasses in the file cannot find their module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(code)
    except ImportError as error:
        raise _missing(ref, error) from error
    except Exception as error:
        raise _failed(ref, "the file", error) from error
    lacking = [h for h in ("build", "samples") if not callable(getattr(code, h, None))]
    if lacking:
        have = [n for n in vars(code) if not n.startswith("_")]
        raise InputRefused("DT302", f"{path.name} must define build() and samples() (missing: {', '.join(lacking)})",
                           detail=sorted({nearest(n, have) for n in lacking}))  # fmt: skip
    file = ModelFile(ref, code)
    _check_hooks(file)
    return file


def open_model_file(ref: ModelRef) -> Source:
    """The Source that a model file describes."""
    with tracking() as opened:
        file = read_model_file(ref)
        module = file.call("build")
        if not isinstance(module, nn.Module):
            raise InputRefused("DT302", f"build() must return a torch.nn.Module (got {type(module).__name__})")
        samples = file.samples()
    module.eval().requires_grad_(False)
    refuse_non_finite(module)
    seen: Seen = {}
    try:
        signature = infer_signature(module, samples, file.hook("INPUTS"), seen)
    except DeployError:
        raise
    except Exception as error:
        raise _failed(ref, "the module on its samples", error) from error
    listed = [Path(p) for p in file.hook("FILES") or ()]
    return Source(
        ref=ref,
        module=module,
        flat=FlatModule(module, signature.input_names, signature.output_names),
        signature=signature,
        samples=lambda: iter(samples),
        seen=seen,
        evaluate=file.hook("evaluate"),
        lower_is_better=tuple(file.hook("LOWER_IS_BETTER") or ()),
        calibration=file.hook("calibration"),
        train_batches=file.hook("train_batches"),
        loss=file.hook("loss"),
        prompts=file.hook("prompts"),
        made_assets=file.hook("assets"),
        dependencies=tuple(sorted({Path(ref.path), *opened, *listed})),
    )


def _check_hooks(file: ModelFile) -> None:
    """A hook of the wrong kind would be met much later, or not at all: a string is a sequence of letters too."""
    given = {name: file.hook(name) for name in HOOKS if file.hook(name) is not None}
    wrong = [f"{name} must be {said}" for names, kinds, said in _KINDS for name in names
             if name in given and not isinstance(given[name], kinds)]  # fmt: skip
    if wrong:
        raise InputRefused("DT302", f"{Path(file.ref.path).name} must define its hooks as documented (got another "
                           "kind)", detail=wrong)  # fmt: skip


def _sample(ref: ModelRef, index: int, sample: Any) -> dict[str, Tensor]:
    if not isinstance(sample, dict):
        raise InputRefused("DT303", f"each sample of {ref.name} must be a dict of tensors "
                           f"(sample {index} is a {type(sample).__name__})")  # fmt: skip
    return {name: as_tensor(name, value) for name, value in sample.items()}


def _missing(ref: ModelRef, error: ImportError) -> DeployError:
    known = "pip install" in str(error)  # as the shipped models say it
    return EnvironmentLacking("DT401", f"model {ref.name!r} needs a package that is missing ({error})",
                              fix="run that command" if known else "install it, where deploytool is")  # fmt: skip


def _failed(ref: ModelRef, what: str, error: Exception) -> DeployError:
    frames = reversed(traceback.extract_tb(error.__traceback__))
    line = next((f.lineno for f in frames if f.filename == ref.path), None)  # None: all frames are a library's
    if isinstance(error, SyntaxError) and error.filename == ref.path:
        line = error.lineno
    return InputRefused("DT302", f"{what} of {ref.name!r} must run (got {type(error).__name__}: {str(error)[:500]})",
                        detail=[f"at {ref.path}:{line}" if line else f"in {ref.path}"])  # fmt: skip
