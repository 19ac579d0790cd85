# Sourced before a training on NVIDIA GPUs: `. launch/gpu_flags.sh`. Only what differs from XLA's defaults and has a
# reason; what XLA_FLAGS holds already comes last and wins. Untimed on this model: measure before you add to it.
# shellcheck shell=sh

# Collectives are moved ahead of the products that do not need them. Off by default; all FSDP depends on it.
emo_flags='--xla_gpu_enable_latency_hiding_scheduler=true'
# A layer's dense weights (34 MB in bfloat16 for emo_1b14b) in one gather, their gradients in one scatter: the defaults of
# 30 MB would cut them in two. Barriers between layers keep it from growing beyond a layer.
emo_flags="$emo_flags --xla_gpu_all_gather_combine_threshold_bytes=134217728"
emo_flags="$emo_flags --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
export XLA_FLAGS="$emo_flags${XLA_FLAGS:+ $XLA_FLAGS}"
unset emo_flags

# JAX takes 75 % of a GPU's memory by default. NCCL and CUDA need some of the rest; 10 % is what NVIDIA recommends.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

# Left as they are: CUDA graphs (command buffers) and pipelined reduce-scatters are on by default, NCCL chooses NVLink SHARP
# by itself, and CUDA_DEVICE_MAX_CONNECTIONS=1, which older advice sets, is wrong on Blackwell.
