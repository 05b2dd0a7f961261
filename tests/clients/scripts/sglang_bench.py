"""The load generator of sglang's wheel, an extension module: sglang_bench.py FILE [options]."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

path = Path(sys.argv.pop(1))
name = path.name.split(".")[0]
loader = importlib.machinery.ExtensionFileLoader(name, str(path))
spec = importlib.util.spec_from_file_location(name, path, loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
# It returns its report as text.
module.run_argv(sys.argv)
