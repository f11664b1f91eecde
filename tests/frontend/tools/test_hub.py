"""Saves on the Hub, with a folder in its place."""

import shutil

import pytest
import torch
from reference import randomize

huggingface_hub = pytest.importorskip("huggingface_hub")
from factories import mlp

import moe_rewrite
from moe_rewrite import MoeRewriteError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in: repositories are folders below this one."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, allow_patterns, delete_patterns, **options):
            assert options["commit_message"] == "Upload experts"
            for old in (tmp_path / repo_id).glob(delete_patterns):
                old.unlink()
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, revision, allow_patterns):
        if not (tmp_path / repo_id).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def test_experts_are_pushed_and_loaded_with_a_card(hub):
    dense, x = mlp().eval(), torch.randn(2, 16)
    moe = moe_rewrite.convert(dense, split=2, example_inputs=x, verify=False)
    for _ in range(2):
        randomize(moe)
        assert moe.push_to_hub("me/experts") == "https://huggingface.co/me/experts"
    files = sorted(f.name.split("-")[0] for f in (hub / "me/experts").iterdir())
    assert files == ["README.md", "moe_rewrite", "moe_rewrite.json"]
    card = (hub / "me/experts" / "README.md").read_text()
    assert "library_name: moe_rewrite" in card and "| expert0 | no | yes |" in card
    assert "LoRA experts" in card and "3.0" in card
    back = moe_rewrite.load("me/experts", dense, x, verify=False)
    assert torch.equal(back(x), moe(x))
    (hub / "me/experts" / "README.md").write_text("my own words")
    moe.save_pretrained(hub / "me/experts")
    assert (hub / "me/experts" / "README.md").read_text() == "my own words"
    with pytest.raises(MoeRewriteError, match="me/nothing: no such folder, and it cannot be read"):
        moe_rewrite.load("me/nothing", dense, x)
