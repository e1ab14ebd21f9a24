"""An experiment as JSON, and back: what a run folder keeps of what it was asked to do."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import cattrs

from pliant.errors import UserError
from pliant.experiment import Experiment

RECIPE_MODULE = "pliant_recipe_file"
"""Name under which a recipe file is loaded."""


def load_recipe_file(path: Path) -> ModuleType:
    """Runs a recipe file as a module.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"There is no recipe file {path}: write the path of one, for instance recipes/usnet_mbv2.py.")
    spec = importlib.util.spec_from_file_location(RECIPE_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[RECIPE_MODULE] = module
    spec.loader.exec_module(module)
    return module


def dump(experiment: Experiment) -> str:
    """The experiment as indented JSON; the recipe's class by name, one of the recipe file as `recipe.py:Name`."""
    fields = {item.name: getattr(experiment, item.name) for item in dataclasses.fields(experiment)}
    plain: dict[str, Any] = {name: _converter.unstructure(value) for name, value in fields.items()}
    kind = type(experiment.recipe)
    module = "recipe.py" if kind.__module__ in ("__main__", RECIPE_MODULE) else kind.__module__
    plain["recipe"] = {"type": f"{module}:{kind.__qualname__}", **_converter.unstructure(experiment.recipe)}
    return json.dumps(plain, indent=2) + "\n"


def load(folder: Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
        UserError: the folder holds none, or one that this version cannot read.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no experiment.json; write the folder of a run, as train named it.")
    try:
        plain = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): write the folder of another run.") from None
    try:
        recipe_fields = dict(plain.pop("recipe"))
        module_name, _, name = str(recipe_fields.pop("type")).partition(":")
        module = (
            load_recipe_file(folder / "recipe.py")
            if module_name == "recipe.py"
            else importlib.import_module(module_name)
        )
        recipe = _converter.structure(recipe_fields, getattr(module, name))
        hints = get_type_hints(Experiment)
        values = {key: _converter.structure(value, hints[key]) for key, value in plain.items()}
        return Experiment(recipe=recipe, **values)
    except UserError:
        raise
    except Exception as error:  # cattrs has several, and a recipe file may raise anything
        raise UserError(
            f"{path} was written by another version of Pliant or of its recipe ({error!r}): check out the commit that "
            "its environment.json names."
        ) from error


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    return converter


_converter = _make_converter()
