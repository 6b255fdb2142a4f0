#!/usr/bin/env bash
# HSTU and SASRec on MovieLens latest-small, leave one out, full catalogue; then A-SFT and rivals from HSTU's BC. 5 seeds, one setting of each method.
#   TEMPER_DATA=<folder that holds ml_latest_small> bash runs/asft_movielens.sh
# The published shapes, for GPUs, once ml-1m or ml-20m is where data/README.md says (README.md has the published HR@10 / NDCG@10):
#   python train_asft.py --data=ml-1m --size=ml-1m --max_length=200 --batch_size=128 --softmax=sampled --lr=1e-3 --decay_share=0 --pretrain_steps=4800 --eval_every=480
#   python train_asft.py --data=ml-20m --size=ml-20m-large --max_length=200 --batch_size=128 --softmax=sampled --lr=1e-3 --pretrain_steps=109000 --eval_every=5000
set -euo pipefail
cd "$(dirname "$0")/.."
root=out/movielens
mkdir -p "$root"
. runs/jobs.sh

shape="--data=ml-latest-small --size=ml-1m --max_length=50 --batch_size=32 --device_batch_size=16 --ensemble=3 --pretrain_steps=${STEPS:-300} --eval_every=60"
one() { local name=$1 seed=$2; shift 2; run train_asft.py ${name}_s$seed --seed=$seed $shape "$@"; }
for s in ${SEEDS:-0 1 2 3 4}; do
    spawn one sasrec $s --backbone=sasrec --judges=1 --judge_steps=1 --method=tilt
    spawn one hstu $s --judges=1 --judge_steps=80 --num_steps=30 --method=asft,bc,reward_bc,exp_rsft,awr,cql,dpo,ppo,tilt
done
join
python runs/asft_tables.py "$root"
