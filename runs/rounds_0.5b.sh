#!/usr/bin/env bash
# Rejection-sampling SFT of a 0.5B model with four buckets: math (GSM8K), code (MBPP), tool (generated episodes), chat (yours, and answers to
# composed constraints that the graders verified). One GPU with 40 GB or more, Linux (the sandbox). Not yet run on a GPU by us.
#     INIT=<folder, e.g. out/mid_0.5b> CHAT=<jsonl of conversations> bash runs/rounds_0.5b.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: "${INIT:?a checkpoint folder}" "${CHAT:?conversations as JSON lines}"
python train_sft.py --name=rounds_0.5b --init="$INIT" --data=gsm8k,mbpp,tools,chat="$CHAT" --mix=gsm8k:.3,mbpp:.1,tools:.4,chat:.2 --long=drop \
    --num_steps=400 --lr=2.5e-5 --muon_lr=0 --seq_len=4096 --device_batch_size=4 --total_batch_size=131072 --decay_share=1 --recompute=true --save_every=100 \
    --rounds=3 --pool=gsm8k,mbpp,tools/1,tools/2,tools/3,tools/4,tools/5,tools/6,instructions --num_prompts=1000 --num_samples=8 --eval_problems=300 \
    --eval_tasks=gsm8k,mbpp,tools/1@test_both,tools/3@test_schema,tools/4@test_schema,tools/5@test_schema,tools/6,instructions@test
