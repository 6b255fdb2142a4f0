#!/usr/bin/env bash
# Everything about speed that needs a GPU, in one go of half an hour; tables and JSON lines in out/gpu/. Parts that fail are named and the rest goes on.
#   tests    pytest -m gpu
#   kernels  bench.py gemm head hstu decode, beside whichever peers are installed (requirements-peers.txt; liger_kernel, cut_cross_entropy)
#   sft      tokens per second and MFU of training steps of Qwen3's 0.6B shape, 16k packed tokens a step, and that nothing is compiled anew
#   steps    training steps and rollouts of a 0.44B model beside TRL's: bench.py sft dpo grpo
#   learn    the quickstart's recipe with curves
# PARTS="tests kernels" bash runs/gpu.sh runs some. Not yet run on a GPU by us.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
export WANDB_MODE=disabled
root=out/gpu
mkdir -p $root
part() { local name=$1; shift; echo "== $name"; "$@" > $root/$name.txt 2>&1 || echo "$name failed: $root/$name.txt"; tail -n ${LINES_SHOWN:-12} $root/$name.txt; }

shape() { python - <<'PY'
import checkpoint
from model import ModelConfig, Transformer
from tokenizer import Tokenizer
config = ModelConfig(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, rope_theta=1e6,
                     qk_norm=True, tie_embeddings=True)
checkpoint.save_hf(Transformer(config).init_weights(0), Tokenizer.bytes(), "out/gpu/qwen3-0.6b-shape")
PY
}
sft() {
    [ -e $root/qwen3-0.6b-shape/config.json ] || shape || return
    TORCH_LOGS=recompiles python train_sft.py --name=gpu/sft_$1 --overwrite --init=$root/qwen3-0.6b-shape --data=stdlib --seq_len=4096 --device_batch_size=4 \
        --total_batch_size=16384 --num_steps=40 --eval_every=0 --muon_lr=0 --lr=1e-5 --compile="$1" || return
    python - "$1" <<'PY'
import json
import sys
lines = [json.loads(line) for line in open(f"out/gpu/sft_{sys.argv[1]}/metrics.jsonl")]
steps = [line for line in lines if "time/step" in line][10:]
middle = lambda key: sorted(line[key] for line in steps if key in line)[len(steps) // 2] if any(key in line for line in steps) else None
print({key: middle(key) for key in ("time/step", "time/tokens_per_sec", "time/mfu")})
PY
}
for name in ${PARTS:-tests kernels sft steps learn}; do
    case $name in
    tests)   part tests python -m pytest -q -m gpu ;;
    kernels) for group in gemm head hstu decode; do LINES_SHOWN=40 part $group python bench.py $group --out=$root/$group.json; done ;;
    sft)     part sft_false sft false; part sft_true sft true ;;
    steps)   for group in sft dpo grpo; do part $group python bench.py $group --size=base --rounds=2 --steps=8 --out=$root/$group.json; done ;;
    learn)   part learn bash runs/quickstart.sh ;;
    esac
done
