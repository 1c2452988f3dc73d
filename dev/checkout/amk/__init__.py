"""Gives a checkout that is not installed the import name `amk`, whatever its folder is called.

With `dev/checkout` on `sys.path`, `import amk` runs the checkout's own `__init__.py` and finds every module there.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
__path__[:] = [str(_ROOT)]
__file__ = str(_ROOT / "__init__.py")
exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
