"""A dense model with as many active parameters as emo_tiny, but for its router.

python -m emo_jax.train --config=configs/dense_tiny.py --workdir=runs/dense_tiny

Hardware, data and tokens: as configs/emo_tiny.py. Parameters: 254,400, all active.
"""

from emo_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig


def get_config() -> Config:
    """The run, before overrides."""
    return Config(
        model=ModelConfig(
            vocab_size=1024,
            d_model=64,
            num_layers=3,
            num_heads=2,
            num_experts=0,
            d_dense=128,
            dtype="float32",
        ),
        pool=PoolConfig(kind="none"),
        data=DataConfig(
            sequence_length=256, batch_size=16, max_documents=16, max_document_bytes=2000, heldout_documents=12
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.1),
        train=TrainConfig(steps=1000, eval_every=100, checkpoint_every=100),
    )
