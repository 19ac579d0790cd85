"""EMO small enough for two CPU cores: what `make demo` trains.

python -m emo_jax.train --config=configs/emo_tiny.py --workdir=runs/emo_tiny

Hardware: two CPU cores, 1.1 GB of memory, about five minutes. Data: text found on the machine itself.
Parameters: 776,448, of which 260,352 active per token (194,816 without the embedding).
FLOPs: 1.46 MFLOP a token, forward and backward. Tokens: 4.1M (1000 steps of 4096).
Reaches: 3.2 nats a token held out, without a pool (it depends on the text the machine holds; BUILD_NOTES.md).
"""

from emo_jax.config import BalanceConfig, Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig


def get_config() -> Config:
    """The run, before overrides."""
    return Config(
        model=ModelConfig(
            vocab_size=1024,
            d_model=64,
            num_layers=3,
            num_heads=2,
            num_experts=32,
            num_shared_experts=1,
            top_k=4,
            d_expert=32,
            dtype="float32",
        ),
        pool=PoolConfig(kind="document", min=3, max=32),
        balance=BalanceConfig(weight=0.1, router_z_weight=1e-3),
        data=DataConfig(
            sequence_length=256, batch_size=16, max_documents=16, max_document_bytes=2000, heldout_documents=12
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.1),
        train=TrainConfig(steps=1000, eval_every=100, checkpoint_every=100),
    )
