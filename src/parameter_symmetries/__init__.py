"""The core under a name of its own, for other projects: `pip install -e .` in the repository.

Without -e the files that it reads would not be there. Importing it makes PyTorch flush denormal
numbers to zero, as importing `models` does.

    from parameter_symmetries.module_symmetry import symmetry_of, teleport_module

The core's modules import each other as `models` and `teleportation`. Another project may have
modules of these names, so ours have them during this import alone: then sys.modules is as it was.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

CORE = "models", "teleportation", "module_symmetry"  # each after those that it imports

others = {name: sys.modules.pop(name) for name in CORE if name in sys.modules}
try:
    for name in CORE:
        path = Path(__file__).resolve().parents[2] / f"{name}.py"
        if not path.exists():
            raise ImportError(f"{path} is missing: install with `pip install -e` in the repository")
        spec = spec_from_file_location(f"{__name__}.{name}", path)
        module = module_from_spec(spec)
        sys.modules |= {spec.name: module, name: module}
        globals()[name] = module
        spec.loader.exec_module(module)
finally:
    for name in CORE:
        sys.modules.pop(name, None)
    sys.modules |= others
