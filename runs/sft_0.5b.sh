#!/usr/bin/env bash
# Mid-training with replay, then SFT, of a 0.5B model on GSM8K; one GPU with 40 GB or more. The rates are the usual ones for 0.5B: a tenth to a
# third of the pre-training peak for mid-training, 5e-5 for SFT (by the square root of the batch). Not yet run on a GPU by us.
#     INIT=<folder of Qwen2.5-0.5B> NEW=<text or jsonl> OLD=<text or jsonl> bash runs/sft_0.5b.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: "${INIT:?a Hugging Face folder}" "${NEW:?new text to learn}" "${OLD:?text to replay}"
shape="--seq_len=4096 --device_batch_size=4 --muon_lr=0 --recompute=true --warmup_steps=20 --decay_share=1"
python train_sft.py --name=mid_0.5b --init="$INIT" --data=new="$NEW" --replay_data=old="$OLD" --replay=.2 --num_epochs=1 --lr=5e-5 --weight_decay=.1 \
    --total_batch_size=262144 --save_every=200 $shape
python train_sft.py --name=sft_0.5b --init=out/mid_0.5b --data=gsm8k --num_epochs=2 --lr=5e-5 --total_batch_size=131072 --save_every=200 $shape
python eval.py --init="$INIT",out/mid_0.5b,out/sft_0.5b --tasks=gsm8k,bpb:old="$OLD" --num_problems=1319 --out=out/eval_0.5b
