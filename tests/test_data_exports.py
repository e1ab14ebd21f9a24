"""What `pliant.data` exports is there when it is asked for, and what it is does not depend on what was imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import importlib, pkgutil, sys, types
import pliant.data
if sys.argv[1] == "after":
    for module in pkgutil.walk_packages(pliant.data.__path__, "pliant.data."):
        if "dali" not in module.name:
            importlib.import_module(module.name)
else:
    assert "torch" not in sys.modules
found = [[getattr(pliant.data, name) for name in pliant.data.__all__] for _ in range(2)]
assert found[0] == found[1]
assert not any(isinstance(one, types.ModuleType) for one in found[0])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_exports_are_the_same_before_and_after_their_modules_are_imported(moment):
    subprocess.run([sys.executable, "-c", CODE, moment], check=True)


def test_what_is_not_exported_is_an_attribute_error():
    import pliant.data

    with pytest.raises(AttributeError, match=r"'pliant\.data' has no attribute 'nothing'"):
        _ = pliant.data.nothing
