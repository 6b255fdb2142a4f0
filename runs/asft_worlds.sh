#!/usr/bin/env bash
# A-SFT and its rivals in synthetic worlds whose true policy values are known: tables, intervals and the phase map, in out/asft/. Can be stopped and
# started again: what has finished is skipped. Two jobs at a time; some two hours on two cores (an estimate).
#   noise   rewards so noisy that the reward model is no better than the mean of each item
#   bias    bait is followed by autoplay: all observers see satisfaction there, and there is none
#   scales  users rate on scales of their own, and habitual clickers generously: V is the mean of a user's earlier rewards. With a tenth of the
#           rewards, with all of them, and with a tenth less these means before any method reads them
#   map     noise x bias: which method wins at which quality of the reward model
#   temp    noise x temperature of the weights: the inverted U
# SEEDS="0 1 2" bash runs/asft_worlds.sh runs fewer seeds; WORLDS="noise" only some of the five.
set -euo pipefail
cd "$(dirname "$0")/.."
root=out/asft
mkdir -p "$root"
. runs/jobs.sh

small="--num_users=1000 --pretrain_steps=400 --judge_steps=200 --judges=2 --num_steps=100 --batch_size=32 --eval_every=50"
world() { local name=$1 seed=$2; shift 2; run train_asft.py ${name}_s$seed --seed=$seed $small "$@"; }
main="asft,bc,reward_bc,exp_rsft,awr,cql,dpo,ppo,exact,tilt"
for kind in ${WORLDS:-noise bias scales map temp}; do
    case $kind in
    noise) for s in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do spawn world noise $s --noise=4 --method=$main --trials=4; done ;;
    bias)  for s in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do spawn world bias $s --autoplay=.95 --method=$main --trials=2; done ;;
    scales) flags="--generosity=3 --habit=4 --high=5 --method=asft,bc,reward_bc,exp_rsft,dpo,ppo,tilt --trials=3"
           for s in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do
               spawn world scales $s $flags --reward_share=.1 --baseline=user
               spawn world scales_all $s $flags --baseline=user
               spawn world scales_centered $s $flags --reward_share=.1 --reward=centered --baseline=zero
           done ;;
    map)   for s in ${MAP_SEEDS:-0 1}; do for noise in 0 1 4; do for auto in 0 .3 .6 .95; do
               spawn world map_n${noise}_a$auto $s --noise=$noise --autoplay=$auto --method=asft,bc,reward_bc,exp_rsft,cql,ppo,exact,tilt --trials=2; done; done; done ;;
    temp)  for s in ${TEMP_SEEDS:-0 1 2 3 4}; do for noise in 0 1 2; do
               spawn world temp_n$noise $s --noise=$noise --judges=0 --method=asft,exp_rsft,tilt \
               --trials=$((noise < 2 ? 6 : 5)); done; done ;;      # at noise 2 the gradient of exp(r / .2) overflows
    esac
done
join
python runs/asft_tables.py "$root"
