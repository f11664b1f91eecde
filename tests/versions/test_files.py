"""What `files` checks between environments, in one."""

import pytest

from tests.helpers.sweeps import some
from tests.versions.files import GENERATING, MODELS, read, write


@pytest.mark.parametrize("name", some(MODELS, {"Qwen3"}))
def test_files_that_are_read_answer_as_their_writer(name, tmp_path):
    write(tmp_path, [name])
    found = {form: apart for _, form, apart in read(tmp_path)}
    forms = ["save", "standard"] if name == "Qwen3" else ["save"]
    if name in GENERATING:
        forms = ["ONNX, text", "alone", "alone, text", "save", "save, text"]
    assert sorted(found) == forms
    assert max(found.values()) < 1e-6
