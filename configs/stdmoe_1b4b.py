"""A standard mixture with 32 experts: what a quarter of EMO's experts is measured against.

python -m emo_jax.train --config=configs/stdmoe_1b4b.py --workdir=DIR \\
    --config.data.path='TEXTS/*.jsonl.gz' --config.data.tokenizer=DOLMA2/tokenizer.json

Parameters: 3.90B, 1.49B active per token. FLOPs: 8.49 GFLOP a token. Tokens: 130B (30,995 steps of 4.19M).
"""

from emo_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PoolConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The run, before overrides."""
    return Config(
        model=ModelConfig(
            vocab_size=100_352,
            d_model=2048,
            num_layers=16,
            num_heads=16,
            num_experts=32,
            num_shared_experts=1,
            top_k=8,
            d_expert=1024,
            remat="full",
        ),
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(weight=0.1, scope="microbatch", router_z_weight=1e-3),
        data=DataConfig(source="jsonl", sequence_length=4096, batch_size=1024, max_documents=64, max_repetitions=32),
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(
            steps=30_995, microbatches=2, guard_window=0, log_every=10, eval_every=2500, checkpoint_every=1000
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
