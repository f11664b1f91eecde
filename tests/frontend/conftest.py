import pytest


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """A converted Llama with tied embeddings and a router that is trained, to copy; it has the graphs
    that a Trainer needs."""
    pytest.importorskip("accelerate")
    import torch
    from small_text import Texts, arguments, llama
    from transformers import Trainer

    import moe_rewrite

    torch.manual_seed(1)
    router = moe_rewrite.TokenRouter(granularity="prefix")
    moe = moe_rewrite.convert(llama(tie_word_embeddings=True), split=1, router=router, verify=False)
    options = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    folder = tmp_path_factory.mktemp("fresh")
    trainer = Trainer(
        moe, arguments(folder, **options), train_dataset=Texts(4), eval_dataset=Texts(4)
    )
    trainer.train()
    trainer.evaluate()
    vars(moe).pop("_is_accelerate_prepared", None)  # a copy is to be prepared with its own options
    moe._experts.trained = [False]
    return moe.eval()
