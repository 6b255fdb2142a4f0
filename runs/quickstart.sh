#!/usr/bin/env bash
# The whole recipe at toy size, on a CPU: base -> mid-training with and without replay -> SFT -> table and picture in out/quickstart/.
# No network, no GPU, no login. Independent stages run side by side, one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 WANDB_MODE=disabled
root=out/quickstart
rm -rf "$root" && mkdir -p "$root"
started=$SECONDS
say() { printf '\n== %d:%02d  %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

# Runs a command with its output in a file; on failure shows the end of that file, so that no error hides in a log.
logged() { local log=$1; shift; "$@" > "$log" 2>&1 || { echo "failed: $* (whole log: $log)"; tail -n 20 "$log"; exit 1; }; }
both() { local a b; "$1" & a=$!; "$2" & b=$!; wait $a && wait $b; }

shape="--seq_len=384 --device_batch_size=8 --total_batch_size=3072"
old=toy/facts_en,toy/facts_ko,toy/text_en,toy/text_ko,stdlib
sft="--data=toy --mix=math_en:.4,math_ko:.2,code:.12,tool:.14,chat_en:.07,chat_ko:.07"

say "base: Python's standard library and bilingual toy text"
python train_sft.py --name=quickstart/base --data=$old --mix=facts_en:.2,facts_ko:.25,text_en:.05,text_ko:.1,stdlib:.4 \
    $shape --num_steps=170 --eval_every=0 | tee "$root/base.log" | grep -v '"'
python eval.py --init=$root/base --tasks=bpb:stdlib,facts_en,facts_ko,reasoning --num_problems=96 --max_bytes=60000 --out=$root/eval_base

say "mid-training on English reasoning, without replay and with a fifth of the tokens replayed, side by side"
mid="--init=$root/base --data=toy/reasoning --replay_data=$old --new_tokens=200000 $shape --eval_every=0 --lr=2e-3 --muon_lr=.01"
mid_0()  { logged "$root/mid_r0.log" python train_sft.py --name=quickstart/mid_r0 $mid; }
mid_20() { logged "$root/mid_r20.log" python train_sft.py --name=quickstart/mid_r20 $mid --replay=.2; }
both mid_0 mid_20

say "SFT on word problems with tool calls, code, tools and instructions: from the base and from the mid-trained model, side by side"
steps="--num_steps=130 --eval_every=26 --eval_tasks=math_en --eval_problems=50"
sft_base() { logged "$root/sft_base.log" python train_sft.py --name=quickstart/sft_base --init=$root/base $sft $shape $steps; }
sft_mid()  { logged "$root/sft_mid.log" python train_sft.py --name=quickstart/sft --init=$root/mid_r20 $sft $shape $steps; }
both sft_base sft_mid

say "evaluation"
retention="--tasks=bpb:stdlib,facts_en,facts_ko,reasoning --num_problems=96 --max_bytes=60000"
eval_mid() { logged "$root/eval_mid.log" python eval.py --init=$root/base,$root/mid_r0,$root/mid_r20 $retention --out=$root/eval_mid; }
eval_sft() { logged "$root/eval_sft.log" python eval.py --init=$root/sft_base,$root/sft --num_problems=60 --out=$root/eval_sft \
    --tasks=math_en,math_ko,code,tool,chat_en,chat_ko; }
both eval_mid eval_sft

python report.py --root=$root
say "done: $root/report.md, $root/report.png. Talk to it:  .venv/bin/python chat.py --init=$root/sft"
