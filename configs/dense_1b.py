"""A dense model with as many active parameters as EMO.

python -m emo_jax.train --config=configs/dense_1b.py --workdir=DIR \\
    --config.data.path='TEXTS/*.jsonl.gz' --config.data.tokenizer=DOLMA2/tokenizer.json

Parameters: 1.48B. FLOPs: 8.48 GFLOP a token. Tokens: 130B (30,995 steps of 4.19M). Weight decay is 0.033, as released.
Reaches (paper, table 1; not reproduced here): MMLU 33.0, MC9 54.1, Gen5 41.5, GSM8K 2.7.
"""

from emo_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig


def get_config() -> Config:
    """The run, before overrides."""
    return Config(
        model=ModelConfig(
            vocab_size=100_352,
            d_model=2048,
            num_layers=16,
            num_heads=16,
            num_experts=0,
            d_dense=8192,
            remat="full",
        ),
        pool=PoolConfig(kind="none"),
        data=DataConfig(source="jsonl", sequence_length=4096, batch_size=1024, max_documents=64, max_repetitions=32),
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            weight_decay=0.033,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=30_995, microbatches=2, log_every=10, eval_every=2500, checkpoint_every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
