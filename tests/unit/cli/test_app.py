from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_args

import pytest

import vlmpack as package
from vlmpack.cli.pack import pack
from vlmpack.packing.methods import METHODS
from vlmpack.pipeline import PipelineConfig
from vlmpack.stages import OversizePolicy

BATCHES_ONLY = {"batch_size", "max_batch_patches", "gpu", "model", "regime", "memory_margin", "memory_replay"}
"""Settings of batches, which the command does not make."""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["pack", "--help"], ["demo", "--help"], ["simulate", "--help"], ["--version"], []],
)
def test_help_needs_no_heavy_library(arguments):
    done = run_python(
        f"import sys; sys.argv = ['vlmpack', *{arguments}]\n"
        "from vlmpack.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write(repr(sorted(sys.modules)))"
    )
    loaded = set(eval(done.stderr[done.stderr.index("[") :]))  # noqa: S307  # what repr has written above
    assert loaded.isdisjoint({"torch", "numba", "transformers", "datasets", "numpy", "PIL", "matplotlib"})
    assert "vlmpack" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_to_run_is_named(missing):
    done = run_python(f"import sys; sys.modules[{missing!r}] = None\nfrom vlmpack.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr == f"the command line needs {missing}: pip install 'vlmpack[cli]'\n"


def test_version(vlmpack):
    assert vlmpack("--version").stdout == f"vlmpack {package.__version__}\n"


def test_a_misspelt_command_is_refused(vlmpack):
    result = vlmpack("pakc")
    assert result.exit_code == 2
    assert "pakc" in result.stderr


def test_every_setting_of_the_pipeline_has_an_option_with_its_default():
    parameters = inspect.signature(pack).parameters
    settings = {
        name: field for name, field in PipelineConfig.model_fields.items() if name not in BATCHES_ONLY
    }
    assert settings.keys() <= parameters.keys()
    defaults = {name: parameters[name].default for name in settings}
    assert defaults == {name: field.default for name, field in settings.items()}


def test_help_names_every_policy_and_the_default_method(vlmpack):
    shown = vlmpack("pack", "--help").stdout
    for policy in get_args(OversizePolicy):
        assert policy in shown
    assert inspect.signature(pack).parameters["method"].default in METHODS
