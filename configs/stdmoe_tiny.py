"""The standard mixture that emo_tiny is compared with: everything equal but the document pools.

python -m emo_jax.train --config=configs/stdmoe_tiny.py --workdir=runs/stdmoe_tiny

Hardware, parameters, FLOPs and tokens: as configs/emo_tiny.py.
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
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(weight=0.1, router_z_weight=1e-3),
        data=DataConfig(
            sequence_length=256, batch_size=16, max_documents=16, max_document_bytes=2000, heldout_documents=12
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.1),
        train=TrainConfig(steps=1000, eval_every=100, checkpoint_every=100),
    )
