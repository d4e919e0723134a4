"""Python imports this at its start where this folder is in PYTHONPATH: see `tests.fake_cuda`."""

import os
import sys
from pathlib import Path

if os.environ.get("FAKE_CUDA"):
    root = str(Path(__file__).parents[3])
    sys.path.insert(0, root)
    from tests.fake_cuda.install import install

    sys.path.remove(root)
    install(os.environ["FAKE_CUDA"])
