"""The standard mixture that EMO is compared with: the same model and recipe without document pools.

python -m emo_jax.train --config=configs/stdmoe_1b14b.py --workdir=DIR \\
    --config.data.path='TEXTS/*.jsonl.gz' --config.data.tokenizer=DOLMA2/tokenizer.json

Parameters: 13.57B, 1.49B active per token. FLOPs: 8.51 GFLOP a token. Tokens: 1T (238,419 steps of 4.19M).
Reaches (paper, table 1; not reproduced here): MMLU 42.4, MC9 63.9, Gen5 59.7, GSM8K 13.9.
Recipes, as overrides. The 1T run is the file as it is; after it:
  50B tokens of linear anneal to 0        --config.train.steps=250339 --config.optimizer.anneal_steps=11920
  the anneal that makes it an EMO, in a folder of its own:
    --config.train.continue_from=DIR --config.train.steps=250339 --config.optimizer.anneal_steps=11920 \\
    --config.pool.kind=document --config.pool.start_step=238419
A run of its own:
  130B tokens                             --config.train.steps=30995
Attention stays within documents here, as for EMO; the public baseline lets it cross them.
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
            num_experts=128,
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
            steps=238_419, microbatches=2, guard_window=0, log_every=10, eval_every=2500, checkpoint_every=1000
        ),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8, chunks=4),
    )
