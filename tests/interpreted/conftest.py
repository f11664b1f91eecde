"""Tests of the Triton kernels as Triton's interpreter runs them: it has to be on from the start of
the process, so that tests/test_kernels_interpreted.py runs these files in processes of their own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
