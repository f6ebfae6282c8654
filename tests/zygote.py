"""Start stages quickly and often: a process that has imported the heavy libraries forks for each.

It reads a json object a line: ``stage``, ``folder``, ``output`` (a file), ``size`` (limit of the
files that it may write, in bytes, or null) and ``plain`` (bound by permissions even as root).
It says "ready" when they are there, and answers with the child's process number as soon as that
is the stage, and, when it has ended, with its exit code (below 0: the signal).
"""

import ctypes
import json
import os
import resource
import runpy
import sys

import accelerate  # noqa: F401
import dvclive  # noqa: F401
import matplotlib.figure  # noqa: F401
import nibabel  # noqa: F401
import pandas  # noqa: F401
import pydantic  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.metrics  # noqa: F401
import transformers
from PIL import Image  # noqa: F401

# Loaded when they are first asked for.
for _name in ("AutoTokenizer", "SiglipForImageClassification", "SiglipModel",
              "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"):  # fmt: skip
    getattr(transformers, _name)


def run(order: dict, told: int) -> None:
    """Become the stage, as `python stages/<stage>.py` in the folder would be; tell when it is."""
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if order["size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["size"], order["size"]))
    if order["plain"]:
        obey_permissions()
    sys.path.insert(0, os.getcwd())
    script = f"stages/{order['stage']}.py"
    sys.argv = [script]
    sys.orig_argv = [sys.executable, script]
    import chest.early  # noqa: F401  (the folder's own)

    os.close(told)
    runpy.run_path(script, run_name="__main__")


def obey_permissions() -> None:
    """Heed the permissions of files even as root: give up Linux's capability CAP_DAC_OVERRIDE."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~(1 << 1)  # of the effective set
    libc.capset(header, sets)


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        begun, telling = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(json.loads(line), telling)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(telling)
        os.read(begun, 1)  # returns when the child has closed its end
        os.close(begun)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
