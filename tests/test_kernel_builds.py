"""Every Triton kernel compiles ahead of time for sm_80 and sm_90 as its launches configure it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
