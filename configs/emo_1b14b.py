"""EMO 1B active / 14B total, as released (arXiv 2605.06663, section 4).

python -m emo_jax.train --config=configs/emo_1b14b.py --workdir=DIR \\
    --config.data.path='TEXTS/*.jsonl.gz' --config.data.tokenizer=DOLMA2/tokenizer.json

Hardware: a TPU pod slice or GPU nodes with 64 or more chips. With the mesh below and 4 rows a chip, each of 64 holds
2.6 GB of parameters and moments and 5.0 GB (v5p) or 5.4 GB (v6e) of temporaries, as compiled.
Layouts of 64 chips that a search found faster, on paper (`python -m emo_jax.plan --config=… --topology=… --search`):
  v5p, 53.4 GB a chip, about 0.7 of this file's step:
    --config.mesh.data=2 --config.mesh.fsdp=32 --config.mesh.expert=1 --config.mesh.chunks=1 \\
    --config.model.remat=none --config.train.microbatches=4
  v4, 30.0 GB a chip, about two thirds of the step of --config.model.remat=exchange --config.train.microbatches=4
    --config.mesh.data=2 --config.mesh.fsdp=32 --config.mesh.expert=1 --config.mesh.chunks=1 \\
    --config.model.remat=dots
Parameters: 13.57B, 1.49B active per token (1.28B without the embedding).
FLOPs: 8.51 GFLOP a token, forward and backward. Tokens: 1T (238,419 steps of 4.19M).
Reaches (paper, table 1; not reproduced here): MMLU 42.8, MC9 63.1, Gen5 57.9, GSM8K 12.0 after 50B more tokens
of linear anneal.
Recipes, as overrides. The 1T run is the file as it is; after it, in the same DIR or in one of its own:
  50B tokens of linear anneal to 0        --config.train.steps=250339 --config.optimizer.anneal_steps=11920
  the same, in a folder of its own:
    --config.train.continue_from=DIR --config.train.steps=250339 --config.optimizer.anneal_steps=11920
Runs of their own:
  130B tokens, the paper's ablations      --config.train.steps=30995
  pools that narrow from all experts      --config.pool.narrowing_steps=5000
  from released weights (HF: their folder, tokenizer.json included; else keep data.tokenizer):
    --config.train.init_from=HF
  10B tokens more, as the public extension recipe, but with a fresh optimizer (DIR or HF; pools of 8 experts):
    --config.train.init_from=DIR --config.train.steps=2384 --config.optimizer.warmup_steps=238 \\
    --config.optimizer.learning_rate=4e-4 --config.optimizer.weight_decay=0.0 --config.pool.max=8
balance.scope=microbatch is what the paper's code does; global is exact under accumulation for one more forward.
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
        pool=PoolConfig(kind="document", min=8, max=128),
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
